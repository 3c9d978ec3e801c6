"""Drift of a served model's scores: mean and spread of each window against those stored at publication.

A policy that has found what a reward model overrates, prompts of another kind, or a model that is not the one
meant show as scores that lie elsewhere than those of the probe file the model was published with
(`rayrm publish --probe`). Pure and cheap: a few additions a score, no list of scores is kept. No torch, no
Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 1024
"""Scores in a window: the error of its mean is then 1/32 of a standard deviation, far below what is warned
of."""

_MOST_SHIFT = 1.0
"""Stored standard deviations that a window's mean may lie off. Prompts differ from hour to hour by a few
tenths; a mean beyond this is higher (or lower) than five in six of the scores that were seen before."""

_MOST_RATIO = 2.0
"""How much wider, or narrower, than stored the scores may be spread: rewards that are normalized in groups
hide such a change from the policy's own metrics."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and standard deviation (divided by `count`) of `count` scores, and the `source` of their texts."""

    mean: float
    std: float
    count: int
    source: str

    @classmethod
    def of(cls, scores: Sequence[float], source: str) -> Distribution:
        """Of these scores, at least one."""
        seen = _Moments()
        for score in scores:
            seen.add(score)
        return cls(seen.mean, seen.std, seen.count, source)

    @classmethod
    def stored(cls, manifest: Mapping[str, Any]) -> Distribution | None:
        """What a published model's manifest holds; None for one that was published without a probe file."""
        found = manifest.get("distribution")
        return None if found is None else cls(**found)


@dataclass(frozen=True, slots=True)
class DriftReading:
    """`mean` and `std` of a window of `count` scores.

    `shift` = (mean - stored mean) / stored std; `std_ratio` = std / stored std. None: nothing is stored.
    """

    count: int
    mean: float
    std: float
    shift: float | None = None
    std_ratio: float | None = None


@dataclass(slots=True)
class _Moments:
    """Welford's running mean and sum of squared deviations: Technometrics 4 (1962), 419-420.

    It loses no digits where the mean is large against the spread, as sums of squares do.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, score: float) -> None:
        self.count += 1
        off = score - self.mean
        self.mean += off / self.count
        self.squares += off * (score - self.mean)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count)


class ScoreWindow:
    """The scores of one model as they are given out; `reading` is that of the last full window.

    `stored`: what windows are held against (None: they are measured and never warned of), with a spread above
    zero.
    """

    def __init__(self, stored: Distribution | None, size: int = WINDOW) -> None:
        assert size >= 1
        assert stored is None or stored.std > 0
        self.stored = stored
        self.size = size
        self.reading: DriftReading | None = None
        self._seen = _Moments()
        self._state = (0, 0)
        self._said = (0, 0)

    def add(self, scores: Sequence[float]) -> list[DriftReading]:
        """Count finite scores in; the readings of the windows that they fill, mostly none or one."""
        readings: list[DriftReading] = []
        for score in scores:
            self._seen.add(score)
            if self._seen.count == self.size:
                readings.append(self._read())
                self._seen = _Moments()
        return readings

    def warning(self) -> str | None:
        """What is wrong with the last full window, once: None until it is something else, or right and then
        wrong again."""
        state, said = self._state, self._said
        self._said = state
        reading, stored = self.reading, self.stored
        if state in (said, (0, 0)) or reading is None or stored is None:
            return None
        faults = []
        if state[0]:
            faults.append(
                f"their mean ({reading.mean:.3g}) is {abs(reading.shift or 0.0):.1f} standard deviations "
                f"{'above' if state[0] > 0 else 'below'} that at publication ({stored.mean:.3g})"
            )
        if state[1]:
            faults.append(
                f"their standard deviation ({reading.std:.3g}) is {reading.std_ratio or 0.0:.2f} times that "
                f"at publication ({stored.std:.3g})"
            )
        return (
            f"the last {reading.count} scores drift: {' and '.join(faults)} on {stored.count} texts of "
            f"{stored.source}. Look at texts that score high: the policy may exploit the model. If the texts "
            "are meant to be of another kind, publish with a `--probe` file of such."
        )

    def _read(self) -> DriftReading:
        seen, stored = self._seen, self.stored
        if stored is None:
            self.reading = DriftReading(seen.count, seen.mean, seen.std)
            return self.reading
        shift, ratio = (seen.mean - stored.mean) / stored.std, seen.std / stored.std
        self.reading = DriftReading(seen.count, seen.mean, seen.std, shift, ratio)
        self._state = (
            (shift > _MOST_SHIFT) - (shift < -_MOST_SHIFT),
            (ratio > _MOST_RATIO) - (ratio < 1 / _MOST_RATIO),
        )
        return self.reading
