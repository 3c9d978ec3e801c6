"""Two models on one set: the exact test against a plain sum, and both test and interval in simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from rayrm.metrics.comparison import compare, mcnemar
from rayrm.metrics.outcomes import Outcomes
from tests.planted import outcomes_with


def exact(a: int, b: int) -> float:
    """Twice the smaller tail of the binomial, in whole numbers."""
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2 ** (a + b))))


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (0, 1), (1, 0), (0, 5), (5, 5), (6, 5), (3, 14), (40, 71), (900, 1024)]
)
def test_mcnemars_p_is_the_binomials(a: int, b: int) -> None:
    assert mcnemar(a, b) == pytest.approx(exact(a, b), rel=1e-9)


def test_mcnemars_p_of_many_prompts_is_finite_and_near_the_normals() -> None:
    a, b = 251_000, 249_000
    z = (a - b - 1) / math.sqrt(a + b)
    assert mcnemar(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(1_000_000, 0) == 0.0


def rights(rng: np.random.Generator, num_prompts: int, a: float, b: float) -> tuple[Outcomes, Outcomes]:
    """Two models with these accuracies that often agree, on prompts with 1 or 4 pairs of like difficulty."""
    sizes = rng.choice([1, 4], size=num_prompts)
    prompt = np.repeat(np.arange(num_prompts), sizes)
    # What a prompt has in common moves each model by itself, and both.
    shift = rng.normal(0, 0.6, (num_prompts, 3))[prompt]
    noise = rng.normal(0, 1, (len(prompt), 3))
    parts = shift + noise
    scale = math.sqrt(2 * 1.36)
    of_a, of_b = (parts[:, 0] + parts[:, 1]) / scale, (parts[:, 0] + parts[:, 2]) / scale
    ids = prompt.astype(np.uint64)
    return (
        outcomes_with(of_a + _normal_quantile(a), prompt=ids),
        outcomes_with(of_b + _normal_quantile(b), prompt=ids),
    )


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def test_the_interval_of_the_difference_covers_95_percent_by_prompts() -> None:
    rng = np.random.default_rng(0)
    num, covered = 4000, 0
    for seed in range(num):
        a, b = rights(rng, 300, 0.75, 0.7)
        found = compare(a, b, num_resamples=1000, seed=seed)
        covered += found.low <= 0.05 <= found.high
    # Known to 0.34%.
    assert 0.94 < covered / num < 0.96


def test_of_models_alike_the_test_calls_5_percent_different_at_most() -> None:
    """At 5%, and with prompts of several pairs; a test that took pairs for independent would call 8%."""
    rng = np.random.default_rng(1)
    num, called, by_pairs = 4000, 0, 0
    for _ in range(num):
        a, b = rights(rng, 300, 0.7, 0.7)
        called += compare(a, b, num_resamples=10).p_value <= 0.05
        right_a, right_b = a.margin > 0, b.margin > 0
        by_pairs += mcnemar(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())) <= 0.05
    # 0.35% is the error of 5% here; what is exact stays some tenths below.
    assert 0.03 < called / num <= 0.05
    assert by_pairs / num > 0.07


def test_a_better_model_is_called_better() -> None:
    a, b = rights(np.random.default_rng(2), 500, 0.8, 0.7)
    found, reverse = compare(a, b), compare(b, a)
    assert found.p_value < 0.001
    assert 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(found.accuracy_a - found.accuracy_b)
    assert found.accuracy_a == pytest.approx(float((a.margin > 0).mean()))
    assert (found.num_prompts, found.num_rows) == (500, len(a.row))
    assert reverse.p_value == found.p_value
    assert (reverse.num_only_a, reverse.num_only_b) == (found.num_only_b, found.num_only_a)
    assert reverse.difference == pytest.approx(-found.difference)


def test_pairs_are_counted_as_mcnemar_counts_them() -> None:
    found = compare(outcomes_with([1, 1, 1, -1, 0]), outcomes_with([1, -1, 0, 1, -1]))
    assert (found.num_only_a, found.num_only_b, found.num_prompts) == (2, 1, 5)
    assert found.p_value == 1.0
    assert found.difference == pytest.approx(0.2)


def test_a_prompt_is_counted_once_by_the_weight_that_is_right() -> None:
    """Of the ranking A has 2 of 3 right and B 1: one prompt for A; the pair is right for both."""
    given = {"row": np.array([0, 0, 0, 1]), "prompt": np.array([7, 7, 7, 8], np.uint64)}
    weight = np.array([1 / 3, 1 / 3, 1 / 3, 1])
    a = outcomes_with([1, 1, -1, 1], weight=weight, **given)
    b = outcomes_with([-1, -1, 1, 1], weight=weight, **given)
    found = compare(a, b)
    assert (found.num_only_a, found.num_only_b, found.num_prompts, found.num_rows) == (1, 0, 2, 2)
    assert found.difference == pytest.approx(1 / 6)


@pytest.mark.parametrize("sign", [1, -1])
def test_models_that_agree_throughout_are_told_apart_no_further_than_the_set_allows(sign: int) -> None:
    one = outcomes_with(sign * np.ones(100))
    found = compare(one, one)
    assert (found.difference, found.p_value) == (0, 1)
    assert -0.04 < found.low < -0.03
    assert found.high == -found.low
    always = compare(outcomes_with(np.ones(100)), outcomes_with(-np.ones(100)))
    assert always.difference == 1
    assert 0.9 < always.low < 0.95
    assert always.high == pytest.approx(1)


@pytest.mark.parametrize("name", ["row", "prompt", "weight"])
def test_other_comparisons_are_refused_by_what_differs(name: str) -> None:
    a = outcomes_with(np.ones(5))
    changed = getattr(a, name).copy()
    changed[3] += 2
    with pytest.raises(ValueError, match=rf"`{name}` of comparison 3 is .* 1 of 5 differ"):
        compare(a, outcomes_with(np.ones(5), **{name: changed}))


def test_sets_of_other_sizes_and_empty_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="on 5 and 4 comparisons"):
        compare(outcomes_with(np.ones(5)), outcomes_with(np.ones(4)))
    with pytest.raises(ValueError, match="no comparison"):
        compare(outcomes_with([]), outcomes_with([]))
