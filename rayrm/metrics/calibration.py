"""Whether a margin means what it says: sigmoid(margin / T) as the probability that the winner wins.

That is what Bradley and Terry's loss trains a margin to be. A model's confidence in a comparison is
sigmoid(|margin| / T), in [0.5, 1]: what it gives the side that it prefers. Equal scores have confidence 0.5
and count as half right, which is what that confidence says (accuracy, elsewhere, counts them wrong). Numpy
only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from rayrm.data.row_index import Floats, Places
from rayrm.metrics.outcomes import Outcomes

NUM_BINS: Final = 10
"""Over [0.5, 1]: as fine as the usual 20 over [0, 1], of which each comparison would be in two."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Comparisons whose confidence lies in (low, high]; the first bin has 0.5 too.

    `confidence` and `accuracy` are weighted means, `count` comparisons, `weight` their weight.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int
    weight: float


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def reliability(outcomes: Outcomes, num_bins: int = NUM_BINS, *, temperature: float = 1.0) -> list[Bin]:
    """The reliability curve: bins of equal width over [0.5, 1], those with a comparison, from the lowest."""
    confidence = sigmoid(np.abs(outcomes.margin) / temperature)
    place = _bin_of(confidence, num_bins)
    weight = np.bincount(place, outcomes.weight, num_bins)
    sure = np.bincount(place, outcomes.weight * confidence, num_bins)
    right = np.bincount(place, outcomes.weight * _half_right(outcomes), num_bins)
    count = np.bincount(place, minlength=num_bins)
    edges = np.linspace(0.5, 1.0, num_bins + 1).tolist()
    return [
        Bin(
            edges[b],
            edges[b + 1],
            float(sure[b] / weight[b]),
            float(right[b] / weight[b]),
            int(count[b]),
            float(weight[b]),
        )
        for b in np.flatnonzero(weight).tolist()
    ]


def calibration_error(
    outcomes: Outcomes, num_bins: int = NUM_BINS, *, temperature: float = 1.0
) -> float | None:
    """The expected calibration error, sum over bins of W_b / W |accuracy_b - confidence_b|; None of none.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3. It is above 0 by chance alone: see
    `error_noise`.
    """
    bins = reliability(outcomes, num_bins, temperature=temperature)
    total = sum(one.weight for one in bins)
    if not total:
        return None
    return sum(one.weight * abs(one.accuracy - one.confidence) for one in bins) / total


def error_noise(outcomes: Outcomes, num_bins: int = NUM_BINS) -> tuple[float, float] | None:
    """Mean and standard deviation of the calibration error that a calibrated model would have by chance.

    If each comparison is right with its confidence c, a bin's W_b (accuracy - confidence) is normal with
    variance v_b = sum over rows of (sum of w sqrt(c (1 - c)))^2: a row's comparisons as right and wrong
    together, which for pairs changes nothing. The error is the sum of |normal| over bins, of

        mean  sqrt(2 / pi) sum sqrt(v_b) / W,    variance  (1 - 2 / pi) sum v_b / W^2

    Of bins of few comparisons that is an approximation. None of no comparison.
    """
    if not len(outcomes.row):
        return None
    confidence = sigmoid(np.abs(outcomes.margin))
    place = _bin_of(confidence, num_bins)
    deviation = outcomes.weight * np.sqrt(confidence * (1 - confidence))
    cell, cell_of = np.unique(outcomes.row * num_bins + place, return_inverse=True)
    variance = np.bincount(cell % num_bins, np.bincount(cell_of, deviation) ** 2, num_bins)
    total = float(outcomes.weight.sum())
    mean = math.sqrt(2 / math.pi) * float(np.sqrt(variance).sum()) / total
    return mean, math.sqrt((1 - 2 / math.pi) * float(variance.sum())) / total


def mean_confidence(outcomes: Outcomes) -> float:
    """The weighted mean of sigmoid(|margin|); of at least one comparison."""
    return _mean(sigmoid(np.abs(outcomes.margin)), outcomes)


def calibrated_accuracy(outcomes: Outcomes) -> float:
    """The accuracy with equal scores as half right; of at least one comparison."""
    return _mean(_half_right(outcomes), outcomes)


def brier_score(outcomes: Outcomes) -> float:
    """The weighted mean of (1 - sigmoid(margin))^2; 0.25 is a model that knows nothing; of one or more.

    G. W. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78
    (1950), of the one outcome "the winner wins".
    """
    return _mean(sigmoid(-outcomes.margin) ** 2, outcomes)


def fit_temperature(outcomes: Outcomes) -> float | None:
    """The T > 0 that minimizes sum w [-log sigmoid(margin / T)] (Guo et al. 2017, section 4.2).

    In b = 1/T that is convex, with slope -sum w m sigmoid(-b m) and curvature sum w m^2 sigmoid(b m)
    sigmoid(-b m): Newton's steps, kept between bounds on which the slope has opposite signs.

    Above 1 the model is overconfident, below 1 underconfident. None where no finite T is best: no margin is
    negative (the surer the better, T -> 0), or their mean is not positive (the model is no better than
    chance, and the best it can say is 0.5, T -> infinity).
    """
    margin, weight = outcomes.margin, outcomes.weight
    if not (margin < 0).any() or weight @ margin <= 0:
        return None
    unit = float(np.abs(margin).max())
    x = margin / unit

    def slope(b: float) -> float:
        return -float((weight * x) @ sigmoid(-b * x))

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    b = (low + high) / 2
    while high - low > 1e-12 * high:
        rise = slope(b)
        low, high = (b, high) if rise < 0 else (low, b)
        bend = float((weight * x * x) @ (sigmoid(b * x) * sigmoid(-b * x)))
        step = b - rise / bend if bend > 0 else low
        if abs(step - b) <= 1e-12 * b:
            break
        b = step if low < step < high else (low + high) / 2
    return unit / b


def _half_right(outcomes: Outcomes) -> Floats:
    return (np.sign(outcomes.margin) + 1) / 2


def _mean(values: Floats, outcomes: Outcomes) -> float:
    return float(outcomes.weight @ values / outcomes.weight.sum())


def _bin_of(confidence: Floats, num_bins: int) -> Places:
    """The place of the bin: (low, high], so that a confidence of 1 is in the last."""
    return np.clip(np.ceil((confidence - 0.5) * 2 * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
