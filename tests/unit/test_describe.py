"""What a set's outcomes are said to be, of planted models: the truth, and nothing that was not planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayrm.metrics.calibration import sigmoid
from rayrm.metrics.describe import describe, describe_groups, findings
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.intervals import accuracy_bootstrap, share_right
from rayrm.metrics.outcomes import Outcomes, outcomes_of
from tests.planted import calibrated_margins, outcomes_with
from tests.unit.test_metrics import index_of

NUM = 5000


def with_lengths(margin: np.ndarray, rng: np.random.Generator) -> Outcomes:
    """These margins, and lengths that have nothing to do with them."""
    num = len(margin)
    return outcomes_with(
        margin, won_length=rng.integers(20, 400, num), lost_length=rng.integers(20, 400, num)
    )


def test_of_a_random_model_the_interval_holds_one_half_and_it_is_said_to_guess() -> None:
    rng = np.random.default_rng(0)
    said = []
    for _ in range(200):
        outcomes = with_lengths(rng.normal(0, 1, 400), rng)
        right = share_right(outcomes)
        assert right is not None
        figures = describe(outcomes, num_resamples=500)
        both = [
            (right.low, right.high),
            (figures["accuracy_bootstrap_low"], figures["accuracy_bootstrap_high"]),
        ]
        said.append([low <= 0.5 <= high for low, high in both])
        assert any(one.startswith("Accuracy is") for one in findings(outcomes)) == (right.low <= 0.5)
    # 95%, known to 1.5%.
    assert (np.mean(said, axis=0) > 0.9).all()


def test_an_overconfident_model_shows_its_error_and_the_temperature_that_mends_it() -> None:
    rng = np.random.default_rng(1)
    outcomes = with_lengths(3 * calibrated_margins(rng, NUM), rng)
    figures = describe(outcomes)
    grid = np.linspace(-16, 16, 100_001)
    density = np.exp(-(grid**2) / 8) / math.sqrt(8 * math.pi)
    error = float((density * (sigmoid(3 * np.abs(grid)) - sigmoid(np.abs(grid)))).sum() * (grid[1] - grid[0]))
    # Four standard errors of a share of 5000.
    assert figures["ece"] == pytest.approx(error, abs=4 * math.sqrt(0.2 / NUM))
    # T's standard error is 2.5% of 5000 pairs.
    assert figures["temperature"] == pytest.approx(3, rel=0.08)
    assert figures["ece_at_temperature"] < 0.025 < figures["ece"] / 3
    (only,) = findings(outcomes)
    assert only.startswith("Overconfident: margins promise")
    assert f"Divided by {figures['temperature']:.2f}" in only


def test_an_underconfident_model_is_said_to_be_so() -> None:
    rng = np.random.default_rng(2)
    (only,) = findings(with_lengths(0.3 * calibrated_margins(rng, NUM), rng))
    assert only.startswith("Underconfident")


def test_of_a_calibrated_model_that_reads_there_is_nothing_to_say() -> None:
    """In 100 sets: three deviations of the calibration's noise, so that one in some hundreds may speak."""
    rng = np.random.default_rng(3)
    said = [findings(with_lengths(calibrated_margins(rng, 800), rng)) for _ in range(100)]
    assert sum(bool(one) for one in said) <= 3


def test_a_model_that_scores_by_length_is_said_to_follow_it() -> None:
    rng = np.random.default_rng(4)
    won_length, lost_length = rng.integers(20, 400, (2, 600)) + np.array([[40], [0]])
    outcomes = outcomes_with(
        won_length / 100, lost=lost_length / 100, won_length=won_length, lost_length=lost_length
    )
    figures = describe(outcomes)
    assert figures["length_correlation"] == pytest.approx(1)
    assert figures["length_margin_correlation"] == pytest.approx(1)
    assert (figures["accuracy_chosen_longer"], figures["accuracy_chosen_shorter"]) == (1, 0)
    assert figures["length_controlled_accuracy"] == pytest.approx(0.5)
    assert findings(outcomes)[0].startswith("Scores follow length")


def test_every_name_is_there_and_none_of_them_is_one_that_evaluation_gives() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(5, 50, (300, 2))
    lengths[:10, 1] = lengths[:10, 0]
    index = index_of([[0, 1]] * 300, lengths=lengths.tolist())
    scores = rng.normal(size=600) + 0.5 * (np.arange(600) % 2 == 0)
    figures = describe(outcomes_of(scores, index), num_resamples=200)
    by_kind = [f"accuracy_{kind}{end}" for kind in _KINDS for end in ("", "_low", "_high")]
    assert set(figures) == {
        "random_baseline_accuracy", "accuracy_bootstrap_low", "accuracy_bootstrap_high",
        "confidence", "ece", "ece_noise", "brier_of_winner", "temperature", "ece_at_temperature",
        "length_correlation", "length_rank_correlation", "length_margin_correlation",
        "length_controlled_accuracy", "length_controlled_accuracy_low", "length_controlled_accuracy_high",
        *by_kind, *(f"num_{kind}" for kind in _KINDS),
    }  # fmt: skip
    assert not set(figures) & set(evaluate_scores(scores, index))
    assert sum(figures[f"num_{kind}"] for kind in _KINDS) == 300
    assert figures["random_baseline_accuracy"] == 0.5


_KINDS = ("chosen_longer", "chosen_shorter", "equal_length")


def test_the_brier_score_is_that_of_evaluation_where_labels_are_certain() -> None:
    """Evaluation gives it where a label is not; with a target of 0.999 the two are as near."""
    rng = np.random.default_rng(6)
    scores, index = rng.normal(size=200), index_of([[0, 1]] * 100)
    outcomes = outcomes_of(scores, index)
    index.targets[:] = 0.99999
    assert evaluate_scores(scores, index)["brier"] == pytest.approx(
        describe(outcomes)["brier_of_winner"], abs=1e-4
    )


@pytest.mark.parametrize(
    "outcomes",
    [
        outcomes_with([]),
        outcomes_with([1.0]),
        outcomes_with(np.zeros(30)),
        outcomes_with(np.ones(30)),
        outcomes_with(-np.ones(30)),
        outcomes_with(np.arange(-10.0, 20.0), prompt=np.zeros(30, np.uint64)),
    ],
    ids=["none", "one", "equal", "right", "wrong", "one prompt"],
)
def test_figures_that_do_not_exist_are_absent_and_none_is_nan(outcomes: Outcomes) -> None:
    figures = describe(outcomes, num_resamples=50)
    assert all(math.isfinite(one) for one in figures.values())
    assert "accuracy_bootstrap_low" not in figures
    assert "length_correlation" not in figures
    assert findings(outcomes)
    assert bool(figures) == bool(len(outcomes.row))


def test_the_bootstrap_is_made_when_asked_for_and_by_prompt() -> None:
    rng = np.random.default_rng(7)
    outcomes = outcomes_with(rng.normal(1, 1, 300), prompt=np.repeat(np.arange(100, dtype=np.uint64), 3))
    assert "accuracy_bootstrap_low" not in describe(outcomes)
    figures = describe(outcomes, num_resamples=300, seed=4)
    bounds = (figures["accuracy_bootstrap_low"], figures["accuracy_bootstrap_high"])
    assert bounds == accuracy_bootstrap(outcomes, num_resamples=300, seed=4)


def of_groups() -> Outcomes:
    """900 of `chat`, of which 90% are right, and 300 of `maths`, of which 60% are; none of `code`."""
    margin = np.concatenate(
        [np.where(np.arange(900) % 10 == 0, -1.0, 3.0), np.where(np.arange(300) % 5 < 3, 1, -1)]
    )
    group = np.repeat([0, 2], [900, 300])
    longer = np.where(np.arange(1200) % 3 == 0, 12, 10)
    return outcomes_with(margin, group=group, groups=("chat", "code", "maths"), won_length=longer)


def test_groups_are_described_each_by_itself_and_empty_ones_are_not() -> None:
    outcomes = of_groups()
    figures = describe_groups(outcomes)
    assert list(figures) == ["chat", "maths"]
    right = share_right(outcomes.of_group("maths"))
    assert right is not None
    assert figures["maths"] == pytest.approx(
        {
            "accuracy": 0.6,
            "accuracy_low": right.low,
            "accuracy_high": right.high,
            "num_pairs": 300,
            "num_rows": 300,
            "margin": 0.2,
            "length_baseline_accuracy": 2 / 3,
        }
    )
    assert describe_groups(outcomes_with([1.0, -1.0])) == {}


def test_a_group_far_below_the_rest_is_named_and_no_other() -> None:
    far = [one for one in findings(of_groups()) if "far below" in one]
    assert len(far) == 1
    assert far[0].startswith(
        "`maths` is far below the rest: 60.0% (54.4 to 65.4%) of 300 pairs, elsewhere 90.0%"
    )


def test_few_rows_and_accuracy_below_chance_are_said() -> None:
    assert findings(outcomes_with([1.0, 2.0, -1.0]))[0].startswith("Few rows (3)")
    worse = findings(outcomes_with(np.where(np.arange(200) % 3 == 0, 0.1, -0.1)))
    assert worse[0].startswith("Accuracy is below chance: 33.5%")
    (nothing,) = findings(outcomes_with([]))
    assert "no comparison" in nothing
