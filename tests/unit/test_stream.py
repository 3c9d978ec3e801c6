"""The steps of a stream: not of block boundaries, exactly once, and the same from any cursor on."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrm.data.blocks import RowBlock, index_of, table_of_rows
from rayrm.data.order import Cursor, StreamOrder
from rayrm.data.stream import StreamCutter, StreamStep
from rayrm.data.tokenize import TokenizedRow

Pieces = list[list[int]]


def table_of_numbers(numbers: list[int]) -> pa.Table:
    """Rows that are known by a number: the first id of each."""
    rows = [TokenizedRow.pair(np.array([n, 7, 8], np.int32), np.array([n, 7, 9], np.int32)) for n in numbers]
    table = table_of_rows(rows)
    return table.set_column(table.schema.get_field_index("row"), "row", pa.array(numbers, pa.int64()))


def read(order: StreamOrder, pieces: Pieces, block_size: int, cursor: Cursor | None = None):
    """The steps from `cursor` on, of a reader that cuts blocks of `block_size` rows."""
    cutter = StreamCutter(order, cursor or Cursor())
    while True:
        plan = order.pieces(cutter.cursor.epoch)
        for position in range(cutter.cursor.piece, len(plan)):
            piece, share = plan[position]
            rows = pieces[piece]
            for begin in range(0, len(rows), block_size):
                table = table_of_numbers(rows[begin : begin + block_size])
                yield from cutter.add(position, share, table, index_of(table))
        yield from cutter.end_epoch()


def numbers_of(step: StreamStep) -> list[int]:
    blocks = [RowBlock(table) for table in step.blocks]
    return [int(blocks[b].row(o).ids[0]) for b, o in zip(step.block_of, step.offset, strict=True)]


def numbered(sizes: list[int]) -> Pieces:
    starts = np.cumsum([0, *sizes])
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]


def epoch_steps(order: StreamOrder, pieces: Pieces, block_size: int, epochs: int) -> list[StreamStep]:
    steps = []
    for step in read(order, pieces, block_size):
        if step.before.epoch == epochs:
            return steps
        steps.append(step)
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 13), min_size=1, max_size=6).filter(any),
    rows_per_step=st.integers(1, 5),
    window=st.integers(1, 40),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_each_row_is_in_one_step_of_an_epoch_wherever_blocks_are_cut(
    sizes: list[int], rows_per_step: int, window: int, seed: int, shuffle: bool
) -> None:
    pieces = numbered(sizes)
    order = StreamOrder((1.0,) * len(sizes), rows_per_step, seed, window, shuffle)
    coarse = epoch_steps(order, pieces, 100, 2)
    fine = epoch_steps(order, pieces, 3, 2)
    assert [numbers_of(step) for step in coarse] == [numbers_of(step) for step in fine]
    assert [step.after for step in coarse] == [step.after for step in fine]
    for epoch in range(2):
        seen = [n for step in coarse if step.before.epoch == epoch for n in numbers_of(step)]
        assert sorted(seen) == list(range(sum(sizes)))
        assert shuffle or seen == sorted(seen)
        sizes_seen = [len(numbers_of(step)) for step in coarse if step.before.epoch == epoch]
        assert all(size == rows_per_step for size in sizes_seen[:-1])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 13), min_size=1, max_size=6).filter(any),
    weights=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0]), min_size=6, max_size=6),
    rows_per_step=st.integers(1, 5),
    window=st.integers(1, 30),
    data=st.data(),
)
def test_from_any_step_on_the_steps_are_those_that_follow(
    sizes: list[int], weights: list[float], rows_per_step: int, window: int, data: st.DataObject
) -> None:
    pieces = numbered(sizes)
    order = StreamOrder(tuple([1.0, *weights[1 : len(sizes)]]), rows_per_step, 5, window)
    if not sizes[0]:
        pieces[0], order = [1000], order  # never an epoch without rows
    whole = list(islice(read(order, pieces, 4), 20))
    begin = data.draw(st.integers(0, len(whole) - 1))
    again = list(islice(read(order, pieces, 7, whole[begin].after), 20 - begin - 1))
    assert [numbers_of(step) for step in again] == [numbers_of(step) for step in whole[begin + 1 :]]
    assert [step.after for step in again] == [step.after for step in whole[begin + 1 :]]


def test_going_on_reads_no_piece_before_the_window_of_its_step() -> None:
    order = StreamOrder((1.0,) * 50, 2, 0, 8)
    whole = list(islice(read(order, numbered([4] * 50), 4), 40))
    assert whole[30].after.piece >= 13  # 31 steps are 62 rows: 15 pieces, and the window begins at row 56
    assert whole[30].before.step == 30


def test_shards_come_in_another_order_each_epoch_and_rows_are_mixed_within_the_window() -> None:
    order = StreamOrder((1.0,) * 8, 2, 3, 16)
    first, second = order.pieces(0), order.pieces(1)
    assert sorted(first) == sorted(second) == [(piece, 1.0) for piece in range(8)]
    assert first != second
    steps = epoch_steps(order, numbered([8] * 8), 8, 1)
    window = [n for step in steps[:8] for n in numbers_of(step)]
    assert {n // 8 for n in window} == {first[0][0], first[1][0]}
    assert window != sorted(window)


@pytest.mark.parametrize(("weight", "times"), [(2.0, [2, 2]), (0.5, [0.5, 0.5])])
def test_a_weight_says_how_often_an_epoch_shows_a_row(weight: float, times: list[float]) -> None:
    order = StreamOrder((weight, 1.0), 4, 1, 16)
    steps = epoch_steps(order, numbered([400, 40]), 100, 2)
    for epoch in range(2):
        seen = np.bincount(
            [n for step in steps if step.before.epoch == epoch for n in numbers_of(step)], minlength=440
        )
        assert (seen[400:] == 1).all()
        assert seen[:400].mean() == pytest.approx(times[epoch], abs=0.08)
        assert weight < 1 or (seen[:400] == weight).all()
    if weight == 0.5:
        total = np.bincount([n for step in steps for n in numbers_of(step)], minlength=440)
        assert (total[:400] == 1).all()  # those that waited in the first epoch have their turn in the second


def test_the_last_short_step_is_left_out_on_demand() -> None:
    order = StreamOrder((1.0,), 4, 1, 16, drop_last=True)
    steps = epoch_steps(order, numbered([10]), 5, 2)
    assert [len(numbers_of(step)) for step in steps] == [4, 4, 4, 4]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 13), min_size=1, max_size=6),
    weights=st.lists(st.sampled_from([0.3, 0.5, 1.0]), min_size=6, max_size=6),
    rows_per_step=st.integers(1, 5),
    window=st.integers(1, 30),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_without_short_steps_a_run_goes_on_from_any_step_and_no_row_is_seen_twice_in_an_epoch(
    sizes: list[int],
    weights: list[float],
    rows_per_step: int,
    window: int,
    seed: int,
    shuffle: bool,
    data: st.DataObject,
) -> None:
    sizes = [rows_per_step, *sizes]  # never an epoch without a step
    pieces = numbered(sizes)
    order = StreamOrder(
        (1.0, *weights[: len(sizes) - 1]), rows_per_step, seed, window, shuffle, drop_last=True
    )
    whole = epoch_steps(order, pieces, 4, 3)
    for epoch in range(3):
        seen = [numbers_of(step) for step in whole if step.before.epoch == epoch]
        assert all(len(step) == rows_per_step for step in seen)
        rows = [n for step in seen for n in step]
        assert len(set(rows)) == len(rows)
        shown = sum(
            int(order.taken(epoch, share, np.zeros(sizes[piece], np.int64), np.array(pieces[piece])).sum())
            for piece, share in order.pieces(epoch)
        )
        assert len(rows) == shown - shown % rows_per_step  # the last short step alone is left out
    begin = data.draw(st.integers(0, len(whole) - 1))
    again = list(islice(read(order, pieces, 7, whole[begin].after), len(whole) - begin - 1))
    assert [numbers_of(step) for step in again] == [numbers_of(step) for step in whole[begin + 1 :]]
    assert [step.after for step in again] == [step.after for step in whole[begin + 1 :]]
