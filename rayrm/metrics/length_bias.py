"""Whether scores follow length: correlations, accuracy by which side is longer, and without length's effect.

Lengths are tokens with the prompt. What compares the two sides of a comparison (margin against difference of
lengths) is free of the prompt's; what goes over all sides is not. Beside these figures belong two that need
no model: "the longer one wins" (`length_baseline_accuracy` of `metrics/evaluation.py`) and chance, 0.5. Numpy
only.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Floats
from rayrm.metrics.intervals import Share, share_of, share_right
from rayrm.metrics.outcomes import Outcomes

FEWEST: Final = 20
"""Comparisons from which on length's effect is estimated: it has two coefficients, and skill a third."""
STRONG: Final = 0.5
"""A correlation of margin and length difference that is worth a word."""
RULE: Final = 0.55
"""The accuracy from which on "the longer one wins", or the shorter, is a rule to be compared with."""
ROUNDING: Final = 1e-6
"""Of the largest score: below it a margin is what a float32 score may be rounded by."""

Bools = npt.NDArray[np.bool_]


def weighted_correlation(first: npt.ArrayLike, second: npt.ArrayLike, weight: Floats) -> float | None:
    """Pearson's, each point with its weight; None where one of them does not vary."""
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    share = weight / weight.sum()
    x, y = x - share @ x, y - share @ y
    return float(np.clip((share * x) @ y / np.sqrt((share @ (x * x)) * (share @ (y * y))), -1.0, 1.0))


def weighted_ranks(values: npt.ArrayLike, weight: Floats) -> Floats:
    """The weight below each value and half of its equals': with equal weights mean ranks, up to a shift."""
    _, place = np.unique(np.asarray(values), return_inverse=True)
    of_value = np.bincount(place, weight)
    return np.asarray((np.cumsum(of_value) - of_value / 2)[place])


def length_correlation(outcomes: Outcomes) -> float | None:
    """Pearson's correlation of score and length over both sides of all comparisons."""
    scores, lengths, weight = _sides(outcomes)
    return weighted_correlation(scores, lengths, weight)


def length_rank_correlation(outcomes: Outcomes) -> float | None:
    """Spearman's: Pearson's of the ranks, which any rising curve of length brings to 1."""
    scores, lengths, weight = _sides(outcomes)
    return weighted_correlation(weighted_ranks(scores, weight), weighted_ranks(lengths, weight), weight)


def length_margin_correlation(outcomes: Outcomes) -> float | None:
    """Pearson's correlation, within comparisons, of margin and length difference, both winner minus other.

    Means are taken off: that good answers are longer, and a good model prefers them, is no bias. What is left
    is whether a winner is preferred the more the longer it is.
    """
    return weighted_correlation(outcomes.margin, _longer_by(outcomes), outcomes.weight)


def accuracy_by_length(outcomes: Outcomes) -> dict[str, Share]:
    """The accuracy where the winner is the `longer` side, the `shorter`, or `equal`; what there is of
    them."""
    longer_by = _longer_by(outcomes)
    chosen: dict[str, Bools] = {"longer": longer_by > 0, "shorter": longer_by < 0, "equal": longer_by == 0}
    found = {name: share_right(outcomes.take(mask)) for name, mask in chosen.items()}
    return {name: share for name, share in found.items() if share is not None}


def length_controlled_margin(outcomes: Outcomes) -> Floats | None:
    """The margins without what length explains of them, `[C]`.

    By weighted least squares over comparisons, all differences winner minus other,

        margin = skill + a (length difference) + b (difference of log length) + rest

    and what is returned is skill + rest: the margin if both sides had one length, as AlpacaEval's length-
    controlled win rate is the one foretold at no difference (Dubois et al. 2024,
    https://arxiv.org/abs/2404.04475, section 3; there a logistic regression on tanh of the scaled difference,
    here margins are known, so that it is linear). Both effects change sign with the sides. `skill` keeps a
    and b from taking the credit where winners are longer on average: a model that never saw the length loses
    nothing. Two curves, since models that follow length do so along it or along its logarithm.

    Returns:
        None of fewer than `FEWEST` comparisons, or where the length difference is the same in all of them.
    """
    longer_by = _longer_by(outcomes)
    if len(longer_by) < FEWEST or np.ptp(longer_by) == 0:
        return None
    log_longer_by = np.log(np.maximum(outcomes.won_length, 1)) - np.log(np.maximum(outcomes.lost_length, 1))
    effects = np.stack([longer_by.astype(np.float64), log_longer_by], axis=1)
    share = outcomes.weight / outcomes.weight.sum()
    margin = outcomes.margin
    centred = effects - share @ effects
    scale = np.sqrt(share @ centred**2)
    # A column that does not vary tells nothing apart from skill.
    varies = scale > 1e-12 * np.maximum(np.abs(effects).max(axis=0), 1e-300)
    root = np.sqrt(share)[:, None]
    design = root * centred[:, varies] / scale[varies]
    slopes, *_ = np.linalg.lstsq(design, root[:, 0] * margin, rcond=1e-9)
    return np.asarray(margin - (effects[:, varies] / scale[varies]) @ slopes)


def length_controlled_accuracy(outcomes: Outcomes) -> Share | None:
    """The share of `length_controlled_margin` above 0; None where there is none.

    One of 0 counts half, and so does one that the rounding of float32 scores can make: a score that is a
    curve of length alone has nothing left, and is at 50%.
    """
    controlled = length_controlled_margin(outcomes)
    if controlled is None:
        return None
    scores, _, _ = _sides(outcomes)
    controlled[np.abs(controlled) <= ROUNDING * np.abs(scores).max()] = 0.0
    return share_of((np.sign(controlled) + 1) / 2, outcomes)


def length_metrics(outcomes: Outcomes) -> dict[str, float]:
    """All of these figures that exist for the set, by the names of `describe`."""
    correlations = {
        "length_correlation": length_correlation(outcomes),
        "length_rank_correlation": length_rank_correlation(outcomes),
        "length_margin_correlation": length_margin_correlation(outcomes),
    }
    found = {name: value for name, value in correlations.items() if value is not None}
    for name, part in accuracy_by_length(outcomes).items():
        key = "equal_length" if name == "equal" else f"chosen_{name}"
        found |= _named(f"accuracy_{key}", part)
        found[f"num_{key}"] = float(part.num_pairs)
    if (controlled := length_controlled_accuracy(outcomes)) is not None:
        found |= _named("length_controlled_accuracy", controlled)
    return found


def length_findings(outcomes: Outcomes) -> list[str]:
    """Sentences with figures for a reviewer, where scores follow length; none where they do not.

    That the margin goes with the length difference (correlation beyond 0.5) and nothing certain is left
    without it (the interval of the length-controlled accuracy holds 0.5); that one of two lengths is
    preferred whichever is right (one interval of accuracy by length above 0.5, the other below); that
    accuracy is not clearly beyond that of a rule of length alone that is right in 55% or more.
    """
    found = []
    within, controlled = length_margin_correlation(outcomes), length_controlled_accuracy(outcomes)
    if within is not None and controlled is not None and abs(within) >= STRONG and controlled.low <= 0.5:
        found.append(
            "Scores follow length: within comparisons margin and length difference correlate by "
            f"{within:.2f}; without length's effect accuracy is {controlled.percent}, where chance is 50%."
        )
    by_length = accuracy_by_length(outcomes)
    longer, shorter = by_length.get("longer"), by_length.get("shorter")
    if longer and shorter:
        for name, liked, other in (("longer", longer, shorter), ("shorter", shorter, longer)):
            if liked.low > 0.5 and other.high < 0.5:
                found.append(
                    f"The {name} side is preferred whether it is right or not: accuracy is {liked.percent} "
                    f"where the winner is {name} ({liked.num_pairs:,} pairs), {other.percent} where it is "
                    f"the other ({other.num_pairs:,} pairs)."
                )
    accuracy = share_right(outcomes)
    baseline = share_of((np.sign(_longer_by(outcomes)) + 1) / 2, outcomes)
    if accuracy is None or baseline is None:
        return found
    word, rule = ("longer", baseline.share) if baseline.share >= 0.5 else ("shorter", 1 - baseline.share)
    if rule >= RULE and accuracy.low <= rule:
        how = "above" if accuracy.share <= rule else "clearly above"
        found.append(
            f'Accuracy, {accuracy.percent}, is not {how} that of "the {word} one wins", {100 * rule:.1f}%, '
            "which reads nothing: on these pairs it cannot be told from length."
        )
    return found


def _longer_by(outcomes: Outcomes) -> npt.NDArray[np.int64]:
    return outcomes.won_length - outcomes.lost_length


def _sides(outcomes: Outcomes) -> tuple[Floats, Floats, Floats]:
    """Scores, lengths and weights of both sides, `[2C]`."""
    lengths = np.concatenate([outcomes.won_length, outcomes.lost_length]).astype(np.float64)
    weight = np.concatenate([outcomes.weight, outcomes.weight])
    return np.concatenate([outcomes.won, outcomes.lost]), lengths, weight


def _named(name: str, share: Share) -> dict[str, float]:
    return {name: share.share, f"{name}_low": share.low, f"{name}_high": share.high}
