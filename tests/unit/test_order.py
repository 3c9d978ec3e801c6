"""Which rows make which step: each row once an epoch, and from any cursor what would have followed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.order import Cursor, Order, Part

ORDERS = st.builds(
    Order,
    num_rows=st.integers(1, 40),
    rows_per_step=st.integers(1, 12),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)


@given(ORDERS)
def test_every_row_comes_exactly_once_an_epoch(order: Order) -> None:
    steps = list(islice(order.steps(), 2 * order.steps_per_epoch))
    for epoch in (0, 1):
        own = steps[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        rows = np.concatenate([step.rows for step in own])
        np.testing.assert_array_equal(np.sort(rows), np.arange(order.num_rows))
        assert all(len(step.rows) == order.rows_per_step for step in own[:-1])
        assert 1 <= len(own[-1].rows) <= order.rows_per_step
        assert own[-1].after == Cursor(epoch + 1, 0)


@given(ORDERS, st.integers(0, 30))
def test_from_a_cursor_follows_what_followed_it(order: Order, done: int) -> None:
    whole = list(islice(order.steps(), done + 5))
    cursor = whole[done - 1].after if done else Cursor()
    for resumed, step in zip(islice(order.steps(cursor), 5), whole[done:], strict=True):
        np.testing.assert_array_equal(resumed.rows, step.rows)
        assert resumed.after == step.after


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_the_order_is_that_of_transformers_trainer(num_rows: int, seed: int, epoch: int) -> None:
    theirs = SeedableRandomSampler(range(num_rows), generator=torch.Generator(), data_seed=seed)
    theirs.set_epoch(epoch)
    assert Order(num_rows, 4, seed).epoch_rows(epoch).tolist() == list(theirs)


def test_epochs_and_seeds_have_different_orders() -> None:
    order = Order(100, 10, seed=1)
    assert not np.array_equal(order.epoch_rows(0), order.epoch_rows(1))
    assert not np.array_equal(order.epoch_rows(0), Order(100, 10, seed=2).epoch_rows(0))
    np.testing.assert_array_equal(order.epoch_rows(3), Order(100, 25, seed=1).epoch_rows(3))


def test_without_shuffling_the_data_s_order_is_kept() -> None:
    (step,) = islice(Order(5, 3, seed=1, shuffle=False).steps(Cursor(7, 1)), 1)
    assert step.rows.tolist() == [3, 4]


def test_drop_last_leaves_out_the_short_step() -> None:
    order = Order(11, 4, seed=0, drop_last=True)
    steps = list(islice(order.steps(), 4))
    assert order.steps_per_epoch == 2
    assert [len(step.rows) for step in steps] == [4, 4, 4, 4]
    assert [step.after for step in steps] == [Cursor(0, 1), Cursor(1, 0), Cursor(1, 1), Cursor(2, 0)]


def test_an_epoch_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step can be made of 3 rows at 4 rows a step"):
        next(Order(3, 4, seed=0, drop_last=True).steps())


def test_a_part_of_weight_two_is_seen_twice_an_epoch_and_one_of_a_third_once_in_three() -> None:
    order = Order(16, 4, seed=3, parts=(Part(4, 2.0), Part(9, 1 / 3), Part(3)))
    assert order.rows_per_epoch == 8 + 3 + 3
    assert order.steps_per_epoch == 4
    total = np.zeros(16, int)
    for epoch in range(3):
        seen = np.bincount(order.epoch_rows(epoch), minlength=16)
        assert seen[:4].tolist() == [2] * 4
        assert seen[4:13].sum() == 3
        assert seen[13:].tolist() == [1] * 3
        total += seen
    assert total[4:13].tolist() == [1] * 9


def test_parts_of_weight_one_are_in_the_order_of_no_parts() -> None:
    parts = Order(10, 4, seed=3, parts=(Part(4), Part(6)))
    assert parts.epoch_rows(1).tolist() == Order(10, 4, seed=3).epoch_rows(1).tolist()
