"""All that is said of a set of outcomes in figures and sentences, beside what `metrics/evaluation.py` says.

A figure that does not exist for a set (the accuracy where the winner is shorter, of a set that has none) is
not there; none is NaN. Without the bootstrap 100,000 pairs take some tenths of a second. Numpy only.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from rayrm.metrics.calibration import (
    brier_score,
    calibrated_accuracy,
    calibration_error,
    error_noise,
    fit_temperature,
    mean_confidence,
)
from rayrm.metrics.intervals import accuracy_bootstrap, share_right
from rayrm.metrics.length_bias import length_findings, length_metrics
from rayrm.metrics.outcomes import Outcomes

FEW_ROWS: Final = 100
"""Below it an interval of 95% is wider than 10 points to each side."""
FAR_BELOW: Final = 0.1
"""A group's accuracy below that of all others that is worth a word, where intervals tell them apart."""


def describe(outcomes: Outcomes, *, num_resamples: int = 0, seed: int = 0) -> dict[str, float]:
    """Figures of a set's outcomes; empty of no comparison.

    Args:
        num_resamples: of the bootstrap by prompt; 0: without it.

    Returns:
        random_baseline_accuracy (0.5); accuracy_bootstrap_low, accuracy_bootstrap_high (95%, by prompt);
        confidence (mean of sigmoid(|margin|)), ece and ece_noise (what a calibrated model would show by
        chance, on average), brier_of_winner, temperature and ece_at_temperature (see
        `calibration.py`); length_correlation, length_rank_correlation, length_margin_correlation,
        accuracy_chosen_longer, accuracy_chosen_shorter, accuracy_equal_length and length_controlled_accuracy,
        each of the four with _low and _high, and num_chosen_longer, num_chosen_shorter, num_equal_length (see
        `length_bias.py`).
    """
    if not len(outcomes.row):
        return {}
    found = {"random_baseline_accuracy": 0.5}
    if num_resamples and (interval := accuracy_bootstrap(outcomes, num_resamples=num_resamples, seed=seed)):
        found |= {"accuracy_bootstrap_low": interval[0], "accuracy_bootstrap_high": interval[1]}
    return found | _calibration_metrics(outcomes) | length_metrics(outcomes)


def describe_groups(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """For each named group with a comparison: accuracy, accuracy_low, accuracy_high (Wilson), num_pairs,
    num_rows, margin, length_baseline_accuracy ("the longer one wins", equal lengths count half)."""
    found = {}
    for name in outcomes.groups if outcomes.groups != ("",) else ():
        of_group = outcomes.of_group(name)
        right = share_right(of_group)
        if right is None:
            continue
        weight = of_group.weight / of_group.weight.sum()
        longer = (np.sign(of_group.won_length - of_group.lost_length) + 1) / 2
        found[name] = {
            "accuracy": right.share,
            "accuracy_low": right.low,
            "accuracy_high": right.high,
            "num_pairs": float(right.num_pairs),
            "num_rows": float(of_group.num_rows),
            "margin": float(weight @ of_group.margin),
            "length_baseline_accuracy": float(weight @ longer),
        }
    return found


def findings(outcomes: Outcomes) -> list[str]:
    """What a reviewer should read before the figures: plain sentences, none of a set without reproach.

    Too few rows; accuracy that chance explains; what `length_findings` says; confidence that is not earned,
    or not dared, beyond what chance makes of it; groups far below all others.
    """
    right = share_right(outcomes)
    if right is None:
        return ["There is no comparison with a winner: nothing can be said of this set."]
    found = []
    if (num_rows := outcomes.num_rows) < FEW_ROWS:
        found.append(
            f"Few rows ({num_rows}): accuracy is known only to lie between {100 * right.low:.0f} and "
            f"{100 * right.high:.0f}%. Evaluate at least {FEW_ROWS}."
        )
    if right.low <= 0.5:
        word = "not above" if right.high >= 0.5 else "below"
        found.append(f"Accuracy is {word} chance: {right.percent}, where guessing has 50%.")
    return found + length_findings(outcomes) + _calibration_findings(outcomes) + _group_findings(outcomes)


def _calibration_metrics(outcomes: Outcomes) -> dict[str, float]:
    temperature, noise = fit_temperature(outcomes), error_noise(outcomes)
    found = {
        "confidence": mean_confidence(outcomes),
        "ece": calibration_error(outcomes),
        "ece_noise": noise[0] if noise else None,
        "brier_of_winner": brier_score(outcomes),
    }
    if temperature is not None:
        found["temperature"] = temperature
        found["ece_at_temperature"] = calibration_error(outcomes, temperature=temperature)
    return {name: value for name, value in found.items() if value is not None}


def _calibration_findings(outcomes: Outcomes) -> list[str]:
    figures, noise = _calibration_metrics(outcomes), error_noise(outcomes)
    # Three deviations: one false word in some 700 calibrated sets.
    if noise is None or figures["ece"] <= noise[0] + 3 * noise[1]:
        return []
    confidence, accuracy = figures["confidence"], calibrated_accuracy(outcomes)
    word = "Overconfident" if confidence > accuracy else "Underconfident"
    sentence = (
        f"{word}: margins promise {100 * confidence:.1f}% right, {100 * accuracy:.1f}% are (calibration "
        f"error {figures['ece']:.3f}, of a calibrated model {noise[0]:.3f} by chance)."
    )
    if "temperature" in figures:
        return [
            f"{sentence} Divided by {figures['temperature']:.2f} they are off by "
            f"{figures['ece_at_temperature']:.3f}."
        ]
    return [f"{sentence} No temperature mends that."]


def _group_findings(outcomes: Outcomes) -> list[str]:
    """Groups whose interval ends below where that of all others begins, and which are far below them."""
    found = []
    for name in outcomes.groups if len(outcomes.groups) > 1 else ():
        is_in = outcomes.group == outcomes.groups.index(name)
        inside, rest = share_right(outcomes.take(is_in)), share_right(outcomes.take(~is_in))
        if inside and rest and inside.high < rest.low and rest.share - inside.share >= FAR_BELOW:
            found.append(
                f"`{name or '(no group)'}` is far below the rest: {inside.percent} of "
                f"{inside.num_pairs:,} pairs, elsewhere "
                f"{100 * rest.share:.1f}%."
            )
    return found
