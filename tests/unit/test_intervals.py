"""Intervals cover what they say: Wilson's of independent rows, the bootstrap's of prompts with many."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from rayrm.metrics.intervals import (
    accuracy_bootstrap,
    bootstrap_interval,
    share_of,
    share_right,
    wilson_interval,
)
from tests.planted import clustered_rights, outcomes_with

NUM_SETS = 4000
"""A coverage of 95% is seen to within 0.34%: the bounds, 94 and 96%, are three deviations away."""


def binomial(n: int, p: float) -> np.ndarray:
    """P(X = k) for k = 0 .. n."""
    k = np.arange(n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k.tolist()])
    return np.exp(ways + k * math.log(p) + (n - k) * math.log(1 - p))


@pytest.mark.parametrize("n", [100, 400, 872])
def test_wilsons_interval_covers_95_percent_over_a_range_of_shares(n: int) -> None:
    """Exactly, by the binomial: of one share coverage jumps with it, of a range it is their mean."""
    bounds = np.array([wilson_interval(k, n) for k in range(n + 1)])
    shares = np.linspace(0.5, 0.95, 91)
    covered = [float(binomial(n, p)[(bounds[:, 0] <= p) & (p <= bounds[:, 1])].sum()) for p in shares]
    assert 0.945 < np.mean(covered) < 0.955
    assert min(covered) > 0.92


@pytest.mark.parametrize(("num_prompts", "share"), [(200, 0.6), (400, 0.8)])
def test_the_bootstrap_by_prompt_covers_95_percent_of_prompts_of_unequal_sizes(
    num_prompts: int, share: float
) -> None:
    """And the same bootstrap that takes each comparison for its own prompt does not; nor does Wilson's."""
    rng = np.random.default_rng(num_prompts)
    covered = alone = wilson = 0
    for seed in range(NUM_SETS):
        right, prompt = clustered_rights(rng, num_prompts, share, correlation=0.3)
        weight = np.ones(len(right))
        low, high = bootstrap_interval(right, weight, prompt, num_resamples=1000, seed=seed) or (2, 2)
        covered += low <= share <= high
        if seed % 4 == 0:
            each = np.arange(len(right))
            low, high = bootstrap_interval(right, weight, each, num_resamples=1000, seed=seed) or (2, 2)
            alone += low <= share <= high
            low, high = wilson_interval(int(right.sum()), len(right))
            wilson += low <= share <= high
    assert 0.94 < covered / NUM_SETS < 0.96
    assert alone / (NUM_SETS / 4) < 0.85
    assert wilson / (NUM_SETS / 4) < 0.85


def test_the_bootstrap_covers_95_percent_of_independent_pairs() -> None:
    rng = np.random.default_rng(0)
    n, covered = 400, 0
    for seed in range(NUM_SETS):
        # Over a range: of one share the coverage of any interval jumps.
        share = rng.uniform(0.6, 0.85)
        right = rng.random(n) < share
        low, high = bootstrap_interval(right, np.ones(n), np.arange(n), num_resamples=1000, seed=seed) or (
            2,
            2,
        )
        covered += low <= share <= high
    assert 0.94 < covered / NUM_SETS < 0.96


def test_the_bootstrap_of_a_weighted_mean_has_the_width_of_its_standard_error() -> None:
    """Of a mean of N(0, 1) with any weights: 2 * 1.96 * sqrt(sum w^2) / sum w."""
    rng = np.random.default_rng(1)
    n = 4000
    values, weight = rng.normal(size=n), rng.uniform(0.5, 2.0, n)
    low, high = bootstrap_interval(values, weight, np.arange(n), num_resamples=4000) or (0, 0)
    # The error of a quantile of 4000 resamples is some 2% of the width.
    assert high - low == pytest.approx(3.92 * math.sqrt((weight**2).sum()) / weight.sum(), rel=0.06)
    assert (low + high) / 2 == pytest.approx(float(weight @ values / weight.sum()), abs=0.1 * (high - low))


def test_a_repeated_comparison_of_a_prompt_adds_no_certainty() -> None:
    rng = np.random.default_rng(2)
    right = rng.random(300) < 0.7
    prompt = np.arange(300)
    once = bootstrap_interval(right, np.ones(300), prompt)
    many = bootstrap_interval(np.repeat(right, 9), np.ones(2700), np.repeat(prompt, 9))
    assert once is not None
    assert many == pytest.approx(once, abs=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly() -> None:
    margins = np.random.default_rng(3).normal(0.5, 1.0, 500)
    first, again, other = (
        bootstrap_interval(margins, np.ones(500), np.arange(500), seed=seed) for seed in (0, 0, 1)
    )
    assert first is not None
    assert first == again
    assert other != first
    assert other == pytest.approx(first, abs=0.01)


def test_the_accuracys_bootstrap_is_of_right_answers_by_prompt() -> None:
    rng = np.random.default_rng(6)
    right, prompt = clustered_rights(rng, 100, 0.7, correlation=0.3)
    outcomes = outcomes_with(np.where(right, 2.0, -3.0), prompt=prompt.astype(np.uint64))
    assert accuracy_bootstrap(outcomes, num_resamples=300, seed=5) == bootstrap_interval(
        right, np.ones(len(right)), prompt, num_resamples=300, seed=5
    )


@pytest.mark.parametrize("right", [[True] * 50, [False] * 50, [True], []])
def test_where_nothing_varies_the_bootstrap_says_nothing(right: list[bool]) -> None:
    assert bootstrap_interval(right, np.ones(len(right)), np.arange(len(right))) is None


def test_an_interval_stays_within_the_range_of_its_values() -> None:
    right = np.arange(60) != 0
    low, high = bootstrap_interval(right, np.ones(60), np.arange(60)) or (2, 2)
    assert 0 < low < 59 / 60 < high <= 1


def test_a_million_comparisons_are_resampled_in_little_memory() -> None:
    rng = np.random.default_rng(4)
    right, prompt = rng.random(1_000_000) < 0.7, rng.integers(0, 400_000, 1_000_000)
    weight = np.ones(1_000_000)
    tracemalloc.start()
    interval = bootstrap_interval(right, weight, prompt, num_resamples=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(3.92 * math.sqrt(0.21 / 1e6), rel=0.1)
    assert peak < 300e6


def test_different_values_are_resampled_by_parts_that_fit_into_memory() -> None:
    values = np.random.default_rng(5).normal(size=200_000)
    tracemalloc.start()
    interval = bootstrap_interval(values, np.ones(200_000), np.arange(200_000), num_resamples=60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert interval is not None
    assert peak < 300e6


def test_a_share_counts_rows_whatever_the_number_of_their_comparisons() -> None:
    """Row 0 has one comparison, right; row 1 has three, of which one is right: 2/3 of two rows."""
    outcomes = outcomes_with(
        [1, 1, -1, -1], row=np.array([0, 1, 1, 1]), weight=np.array([1, 1 / 3, 1 / 3, 1 / 3])
    )
    share = share_right(outcomes)
    assert share is not None
    assert share.share == pytest.approx(2 / 3)
    assert (share.low, share.high) == pytest.approx(wilson_interval(4 / 3, 2))
    assert share.num_pairs == 4


def test_rows_that_are_there_in_part_count_in_part_for_the_interval() -> None:
    """Weights 1, 1/2, 1/2: as certain as (2^2) / (1 + 1/4 + 1/4) rows."""
    outcomes = outcomes_with([1, -1, 1], weight=np.array([1, 0.5, 0.5]))
    share = share_of([1, 0.5, 0], outcomes)
    assert share is not None
    assert share.share == pytest.approx(1.25 / 2)
    assert (share.low, share.high) == pytest.approx(wilson_interval(1.25 / 2 * 8 / 3, 8 / 3))
    assert share_of([], outcomes_with([])) is None
