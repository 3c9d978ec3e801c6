"""A step's plan over any rows: each row once, under the budget, as many micro-batches on every rank."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.planning import plan_step
from rayrm.errors import ConfigError

COSTS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 5), st.integers(50, 120))
def test_the_plan_holds_its_invariants(costs: list[int], num_ranks: int, max_tokens: int) -> None:
    plans = plan_step(costs, num_ranks=num_ranks, max_tokens=max_tokens)
    assert len(plans) == num_ranks
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= 1
    weights: Counter[int] = Counter()
    for microbatch in (microbatch for plan in plans for microbatch in plan):
        assert len(microbatch.rows) == len(microbatch.weights) >= 1
        assert sum(costs[row] for row in microbatch.rows) <= max_tokens
        assert list(microbatch.rows) == sorted(set(microbatch.rows))
        # A dummy is a micro-batch of its own: its cost buys nothing.
        assert set(microbatch.weights) in ({1.0}, {0.0})
        for row, weight in zip(microbatch.rows, microbatch.weights, strict=True):
            weights[row] += int(weight)
    assert weights == dict.fromkeys(range(len(costs)), 1)


@given(COSTS, st.integers(1, 5))
def test_the_plan_is_a_function_of_its_arguments(costs: list[int], num_ranks: int) -> None:
    first = plan_step(costs, num_ranks=num_ranks, max_tokens=64)
    assert first == plan_step(costs, num_ranks=num_ranks, max_tokens=64)


@given(COSTS, st.integers(1, 5))
def test_no_rank_has_more_than_its_share_and_one_longest_row(costs: list[int], num_ranks: int) -> None:
    plans = plan_step(costs, num_ranks=num_ranks, max_tokens=10_000)
    loads = [
        sum(costs[r] for m in plan for r, weight in zip(m.rows, m.weights, strict=True) if weight)
        for plan in plans
    ]
    assert max(loads) <= sum(costs) / num_ranks + max(costs)


def test_fewer_rows_than_ranks_leave_dummies_of_weight_zero() -> None:
    plans = plan_step([7, 3], num_ranks=3, max_tokens=10)
    assert [plan[0].weights for plan in plans] == [(1.0,), (1.0,), (0.0,)]
    assert plans[2][0].rows == (1,)


def test_a_row_above_the_budget_is_refused_with_the_number_to_type() -> None:
    with pytest.raises(ConfigError, match=r"\(63\) is below the longest pair \(64 tokens\). Raise it to 64"):
        plan_step([3, 64], num_ranks=1, max_tokens=63)


def test_a_step_without_rows_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        plan_step([], num_ranks=1, max_tokens=10)
