"""Whether a policy got better: the rewards of fresh samples before and after, paired by prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean rewards `before` and `after`, their difference `gain`, and its 95% interval `low` to `high`.

    `num_samples`: completions of each policy. `num_prompts`: what was drawn again for the interval.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    num_samples: int
    num_prompts: int


def paired_gain(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, seed: int = 0
) -> Gain:
    """The gain of one policy over another on the same prompts, with a bootstrap interval over prompts.

    Args:
        before, after: `[P][S]` rewards of S samples for each of P prompts, in the same order of prompts.

    The interval is the percentile bootstrap of the mean over prompts of their mean differences: samples of
    one prompt resemble each other, so prompts are drawn, not samples.
    """
    if len(before) != len(after) or not before or any(not row for row in (*before, *after)):
        raise ValueError(
            f"{len(before)} and {len(after)} prompts: both need the same ones, at least one, with samples of "
            "each"
        )
    first = np.array([np.mean(row) for row in before], np.float64)
    second = np.array([np.mean(row) for row in after], np.float64)
    differences = second - first
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(differences), size=(_DRAWS, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return Gain(
        float(first.mean()),
        float(second.mean()),
        float(differences.mean()),
        float(low),
        float(high),
        sum(len(row) for row in after),
        len(after),
    )
