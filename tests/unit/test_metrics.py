"""Metrics are exact sums divided once: no cut, order or rank changes them, and the formulas are TRL's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.row_index import RowIndex
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.intervals import wilson_interval
from rayrm.metrics.step import IntervalMean, StepMetrics
from rayrm.objective import Objective

SCORES = st.floats(-50, 50, width=32)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=12)


def index_of(
    ranks: list[list[int]], lengths: list[list[int]] | None = None, margins: list[float] | None = None
) -> RowIndex:
    """The index of rows with these ranks; every completion has 1 token and no margin unless given."""
    count = len(ranks)
    return RowIndex.of(
        prefix_lengths=[0] * count,
        margins=[0.0] * count if margins is None else margins,
        prefix_keys=np.zeros((count, 8)),
        num_completions=[len(row) for row in ranks],
        lengths=[
            1 if lengths is None else lengths[r][k] for r, row in enumerate(ranks) for k in range(len(row))
        ],
        ranks=[rank for row in ranks for rank in row],
        distinct_tokens=[1] * count,
        distinct_attention=[1] * count,
        text_keys=np.arange(sum(map(len, ranks))),
    )


def evaluated(
    chosen: list[float],
    rejected: list[float],
    margins: list[float] | None = None,
    center: float | None = None,
) -> dict[str, float]:
    """Metrics of pairs."""
    scores = np.array([chosen, rejected]).T
    return evaluate_scores(scores, index_of([[0, 1]] * len(chosen), margins=margins), Objective(center))


def test_step_means_are_those_worked_out_by_hand() -> None:
    step = StepMetrics.of(
        [2.0, 1.0, 0.0, -1.0], [1.0, 1.0, 3.0, -4.0], loss=6.0, tokens=40, tokens_computed=25
    )
    assert step.means() == {
        "loss": 1.5,
        "accuracy": 0.5,  # the tie is wrong
        "margin": 0.25,
        "mean_reward": 0.375,
        "min_reward": -4.0,
        "max_reward": 3.0,
    }
    assert (step.tokens, step.tokens_computed) == (40, 25)


@given(pairs=PAIRS, cut=st.integers(0, 12))
def test_the_cut_into_microbatches_and_ranks_does_not_change_the_metrics(
    pairs: list[tuple[float, float]], cut: int
) -> None:
    chosen, rejected = np.array(pairs).T
    losses = np.logaddexp(0, rejected - chosen)
    whole = StepMetrics.of(chosen, rejected, loss=losses.sum(), tokens=7)
    parts = [
        StepMetrics.of(chosen[:cut], rejected[:cut], loss=losses[:cut].sum(), tokens=3),
        StepMetrics.of(chosen[cut:], rejected[cut:], loss=losses[cut:].sum(), tokens=4),
    ]
    added = sum(parts, StepMetrics())
    sent = StepMetrics.from_arrays([part.to_array() for part in parts])
    assert added == sent
    # Float64 sums of at most 12 numbers in another order.
    assert added.means() == pytest.approx(whole.means(), rel=1e-12, abs=1e-12)
    assert added.tokens == whole.tokens


def test_a_dummy_of_weight_zero_counts_nowhere_and_a_half_counts_half() -> None:
    real = StepMetrics.of([1.0, 4.0], [0.0, 5.0], loss=2.0)
    with_dummy = StepMetrics.of([1.0, 99.0, 4.0], [0.0, -99.0, 5.0], loss=2.0, weights=[1, 0, 1])
    assert with_dummy == real
    k_wise = StepMetrics.of([1.0, 1.0, 4.0], [0.0, 0.0, 5.0], loss=2.0, weights=[0.5, 0.5, 1])
    assert k_wise.means() == real.means()


def test_a_step_without_pairs_has_no_metrics() -> None:
    with pytest.raises(ValueError, match="without pairs"):
        StepMetrics.of([], []).means()
    with pytest.raises(ValueError, match="one number for each pair"):
        StepMetrics.of([1.0], [1.0, 2.0])


def test_an_interval_weighs_every_step_the_same_min_and_max_too_and_then_starts_again() -> None:
    interval = IntervalMean()
    for pairs in ([(1.0, 0.0)], [(3.0, 4.0), (5.0, 8.0), (5.0, 8.0)]):
        chosen, rejected = np.array(pairs).T
        interval.add(StepMetrics.of(chosen, rejected).means())
    assert len(interval) == 2
    means = interval.take()
    assert (means["accuracy"], means["min_reward"], means["max_reward"]) == (0.5, 1.5, 4.5)
    assert len(interval) == 0
    assert interval.take() == {}


def test_step_and_evaluation_agree_with_torchs_formulas() -> None:
    torch = pytest.importorskip("torch")
    chosen, rejected, margin = torch.randn(
        3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
    loss = loss + 0.01 * ((chosen + rejected) ** 2).mean()
    ours = evaluated(chosen.tolist(), rejected.tolist(), margins=margin.tolist(), center=0.01)
    # Both are float64; the orders of summation differ.
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-12)
    step = StepMetrics.of(chosen, rejected, loss=loss.item() * 64).means()
    assert {name: ours[name] for name in step} == pytest.approx(step, rel=1e-12)


def test_evaluation_is_what_is_worked_out_by_hand() -> None:
    index = index_of([[0, 1]] * 4, lengths=[[5, 3], [9, 3], [4, 4], [4, 8]])
    ours = evaluate_scores([2, 1, 0, 1, 1, 1, 1, -1], index)
    expected = sum(math.log1p(math.exp(-d)) for d in (1, -1, 0, 2)) / 4
    low, high = wilson_interval(2, 4)
    assert ours == pytest.approx(
        {
            "loss": expected,
            "accuracy": 0.5,
            "accuracy_low": low,
            "accuracy_high": high,
            "ties": 0.25,
            "margin": 0.5,
            "mean_reward": 0.75,
            "min_reward": -1.0,
            "max_reward": 2.0,
            "length_baseline_accuracy": 0.625,
            "num_pairs": 4.0,
            "num_rows": 4.0,
        },
        rel=1e-15,
    )


def test_a_ranked_row_weighs_as_much_as_a_pair_and_its_ties_are_not_compared() -> None:
    # Ranks 1, 0, 0: the second and the third are better than the first; then a pair.
    index = index_of([[1, 0, 0], [0, 1]], lengths=[[4, 6, 4], [1, 2]], margins=[0.5, 0.0])
    ours = evaluate_scores([1.0, 3.0, 0.0, 5.0, 2.0], index, Objective(center=0.1))
    first = (math.log1p(math.exp(-(2 - 0.5))) + math.log1p(math.exp(1 + 0.5)) + 0.1 * (16 + 1)) / 2
    second = math.log1p(math.exp(-3)) + 0.1 * 49
    low, high = wilson_interval(1.5, 2)
    assert ours == pytest.approx(
        {
            "loss": (first + second) / 2,
            "accuracy": 0.75,
            "accuracy_low": low,
            "accuracy_high": high,
            "ties": 0.0,
            "margin": ((2 - 1) / 2 + 3) / 2,
            "mean_reward": ((4 + 1) / 4 + 7 / 2) / 2,
            "min_reward": 0.0,
            "max_reward": 5.0,
            "length_baseline_accuracy": ((1 + 0.5) / 2 + 0) / 2,
            "num_pairs": 3.0,
            "num_rows": 2.0,
        },
        rel=1e-15,
    )


def test_thirds_do_not_add_up_to_more_than_every_row() -> None:
    index = index_of([[0, 1, 2]] * 7)
    assert evaluate_scores([3.0, 2.0, 1.0] * 7, index)["accuracy"] == pytest.approx(1.0, rel=1e-15)


def test_huge_margins_neither_overflow_nor_vanish() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert evaluated([-1e6], [1e6])["loss"] == 2e6
        assert evaluated([400.0], [-300.0])["loss"] == pytest.approx(math.exp(-700), rel=1e-12)
        assert evaluated([0.0], [0.0], margins=[1e5])["loss"] == 1e5


@given(pairs=PAIRS, shift=st.floats(-10, 10))
def test_a_constant_added_to_every_score_changes_only_the_rewards(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    chosen, rejected = (list(side) for side in zip(*pairs, strict=True))
    rounded = [round(score, 3) for score in chosen], [round(score, 3) for score in rejected]
    plain = evaluated(*rounded)
    moved = evaluated(*([score + shift for score in side] for side in rounded))
    # Scores up to 60: rounding of the shifted sums is below 1e-13.
    assert moved["loss"] == pytest.approx(plain["loss"], abs=1e-12)
    assert moved["margin"] == pytest.approx(plain["margin"], abs=1e-12)
    assert moved["mean_reward"] == pytest.approx(plain["mean_reward"] + shift, abs=1e-12)


def test_swapping_the_sides_turns_wins_into_losses_and_keeps_ties() -> None:
    forward, backward = evaluated([2, 1, 0], [1, 1, 5]), evaluated([1, 1, 5], [2, 1, 0])
    assert forward["accuracy"] + backward["accuracy"] + forward["ties"] == pytest.approx(1)
    assert forward["ties"] == backward["ties"]
    assert forward["margin"] == -backward["margin"]


@given(n=st.integers(1, 10**4), share=st.floats(0, 1), z=st.sampled_from([1.0, 1.96, 2.576]))
def test_wilsons_bounds_lie_z_standard_errors_from_the_share(n: int, share: float, z: float) -> None:
    successes = round(n * share)
    for bound in wilson_interval(successes, n, z):
        distance = abs(bound - successes / n)
        # Float64 cancellation near 0 and 1, where the standard error itself is about 1e-8.
        assert distance == pytest.approx(z * math.sqrt(max(0.0, bound * (1 - bound)) / n), abs=1e-7)


def test_wilsons_interval_of_none_in_ten_ends_at_its_closed_form() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)), abs=1e-15)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilsons_interval_holds_the_share_stays_a_share_and_narrows(n: int, share: float) -> None:
    successes = round(n * share)
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    wide_low, wide_high = wilson_interval(successes, n, z=3.0)
    assert wide_high - wide_low > high - low
    assert high - low <= 1.96 / math.sqrt(n) + 1e-9


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([], "at least one row"),
        ([1.0, 2.0, 1.0], "3 scores of 2 completions"),
        ([math.nan, 1.0], "completion 0"),
        ([1.0, math.inf], "completion 1"),
    ],
)
def test_scores_that_cannot_be_evaluated_are_refused_by_name(scores: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate_scores(scores, index_of([[0, 1]] if scores else []))


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_an_impossible_share_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson_interval(successes, n)
