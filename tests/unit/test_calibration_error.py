"""Calibration of margins, on models of which it is known: as drawn, and by integration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayrm.metrics.calibration import (
    brier_score,
    calibrated_accuracy,
    calibration_error,
    error_noise,
    fit_temperature,
    mean_confidence,
    reliability,
    sigmoid,
)
from tests.planted import calibrated_margins, outcomes_with

NUM = 200_000
SPREAD = 2.0


def expected(of: np.ndarray) -> float:
    """The mean of a function of x, given at `GRID`, with x from N(0, SPREAD^2)."""
    density = np.exp(-0.5 * (GRID / SPREAD) ** 2) / (SPREAD * math.sqrt(2 * math.pi))
    return float((of * density).sum() * (GRID[1] - GRID[0]))


GRID = np.linspace(-8 * SPREAD, 8 * SPREAD, 200_001)


def test_a_calibrated_model_has_temperature_1_and_an_error_of_noise_alone() -> None:
    outcomes = outcomes_with(calibrated_margins(np.random.default_rng(0), NUM))
    # T's standard error is 0.4% here, by the curvature of the likelihood.
    assert fit_temperature(outcomes) == pytest.approx(1.0, abs=0.015)
    error, noise = calibration_error(outcomes), error_noise(outcomes)
    assert error is not None
    assert noise is not None
    assert error < noise[0] + 3 * noise[1] < 0.005
    for one in reliability(outcomes):
        # Four standard errors of a bin's accuracy.
        assert one.accuracy == pytest.approx(one.confidence, abs=4 * math.sqrt(0.25 / one.count))
    # E (1 - c)^2 with probability c and c^2 with 1 - c is E c (1 - c).
    right = sigmoid(GRID)
    assert brier_score(outcomes) == pytest.approx(expected(right * (1 - right)), abs=0.002)
    assert mean_confidence(outcomes) == pytest.approx(expected(sigmoid(np.abs(GRID))), abs=0.002)


@pytest.mark.parametrize("temperature", [3.0, 0.4])
def test_scores_times_t_have_temperature_t_the_error_of_the_integral_and_are_mended_by_it(
    temperature: float,
) -> None:
    """Confidence is on one side of accuracy in every bin, so that bins do not enter the expected error."""
    outcomes = outcomes_with(temperature * calibrated_margins(np.random.default_rng(1), NUM))
    fitted = fit_temperature(outcomes)
    assert fitted == pytest.approx(temperature, rel=0.015)
    apart = np.abs(sigmoid(temperature * np.abs(GRID)) - sigmoid(np.abs(GRID)))
    assert expected(apart) > 0.09
    # The mean of 200,000 outcomes has a standard error of 0.001.
    assert calibration_error(outcomes) == pytest.approx(expected(apart), abs=0.004)
    mended = calibration_error(outcomes, temperature=fitted)
    assert mended is not None
    assert mended < 0.005


def test_the_noise_of_the_error_is_what_calibrated_sets_of_that_size_show() -> None:
    rng = np.random.default_rng(2)
    sets = [outcomes_with(calibrated_margins(rng, 600)) for _ in range(800)]
    errors = np.array([calibration_error(one) for one in sets])
    foretold = np.array([error_noise(one) for one in sets]).mean(axis=0)
    # Of 800 sets the mean is known to 1.3%, the deviation to 3%; bins of 40 are not quite normal.
    assert foretold == pytest.approx([errors.mean(), errors.std()], rel=0.08)


def test_the_noise_takes_comparisons_of_one_row_as_one() -> None:
    pairs = outcomes_with(np.ones(50))
    row = np.repeat(np.arange(50), 4)
    rankings = outcomes_with(np.ones(200), row=row, weight=np.full(200, 0.25))
    assert error_noise(rankings) == pytest.approx(error_noise(pairs))


def test_bins_hold_what_they_say() -> None:
    """sigmoid(log 3) = 0.75 is the last of the fifth bin of ten; margins of both signs, one with weight 3."""
    outcomes = outcomes_with(
        [math.log(3) - 1e-9, -math.log(3) + 1e-9, 0.0, 50.0], weight=np.array([3, 1, 1, 2])
    )
    first, middle, last = reliability(outcomes)
    assert (first.low, first.high, first.confidence, first.accuracy) == pytest.approx((0.5, 0.55, 0.5, 0.5))
    assert (middle.low, middle.high) == pytest.approx((0.7, 0.75))
    assert (middle.confidence, middle.accuracy, middle.weight) == pytest.approx((0.75, 0.75, 4))
    assert (last.high, last.confidence, last.accuracy, last.count) == (1.0, 1.0, 1.0, 1)
    assert middle.count == 2
    assert sum(one.weight for one in reliability(outcomes, 3)) == 7


def test_the_error_is_the_weighted_distance_of_accuracy_and_confidence_by_bins() -> None:
    """At sigmoid(log 4) = 0.8: of weight 3 right and 2 wrong; at 0.5: nothing to reproach."""
    outcomes = outcomes_with([math.log(4), -math.log(4), 0.0], weight=np.array([3.0, 2.0, 5.0]))
    assert calibration_error(outcomes) == pytest.approx(0.5 * 0.2)
    assert brier_score(outcomes) == pytest.approx((3 * 0.04 + 2 * 0.64 + 5 * 0.25) / 10)
    assert calibrated_accuracy(outcomes) == pytest.approx(0.55)


def test_of_two_margins_the_temperature_is_known() -> None:
    """Margin 1 right with weight r and wrong with 1: sigmoid(1 / T) = r / (r + 1), T = 1 / log r."""
    for r in (1.001, 2.0, 50.0, 1e9):
        outcomes = outcomes_with([1.0, -1.0], weight=np.array([r, 1.0]))
        assert fit_temperature(outcomes) == pytest.approx(1 / math.log(r), rel=1e-6)


def test_the_temperature_goes_with_the_scale_of_the_scores() -> None:
    margins = calibrated_margins(np.random.default_rng(3), 1000)
    one = fit_temperature(outcomes_with(margins))
    assert one is not None
    for scale in (1e-12, 1e12):
        assert fit_temperature(outcomes_with(scale * margins)) == pytest.approx(one * scale, rel=1e-9)


@pytest.mark.parametrize(
    "margins", [[1.0, 2.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [-1.0, -2.0], []], ids=str
)
def test_where_no_finite_temperature_is_best_there_is_none(margins: list[float]) -> None:
    """All right; right or equal; all equal; no better than chance; all wrong; nothing."""
    assert fit_temperature(outcomes_with(margins)) is None


def test_a_set_without_comparisons_has_no_error_and_no_bin() -> None:
    nothing = outcomes_with([])
    assert (reliability(nothing), calibration_error(nothing), error_noise(nothing)) == ([], None, None)


def test_scores_far_apart_neither_overflow_nor_leave_the_last_bin() -> None:
    (only,) = reliability(outcomes_with([1e6, 1e300, -1e6]))
    assert only.accuracy == pytest.approx(2 / 3)
    assert (only.confidence, only.count) == (1.0, 3)
