"""Metrics of one optimizer step and their mean over a logging interval, with TRL's names.

`StepMetrics` holds sums and counts: adding those of every rank and microbatch, then dividing once, gives the
step's exact metrics whatever the cut. `IntervalMean` averages steps as TRL does, min and max too. Numpy only.

Names: loss (with centering), accuracy (chosen > rejected, strictly), margin (mean of chosen - rejected), and
mean_reward, min_reward, max_reward over both sides. Where some rows have no winner (ties, scores), accuracy
and margin are of the others; mse is that of the scored completions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one rank's microbatch adds to its step's metrics; produced per microbatch, consumed by the log.

    Every field but the extremes is a sum. The default is the metrics of no pair at all.
    """

    pairs: float = 0.0
    """Sum of the pairs' weights."""
    loss: float = 0.0
    """Sum of the pairs' losses, margin and centering included, times their weights."""
    correct: float = 0.0
    """Weight of the pairs whose chosen side scores strictly higher."""
    margin: float = 0.0
    """Sum of weight x (chosen - rejected)."""
    reward: float = 0.0
    """Sum of weight x (chosen + rejected)."""
    min_reward: float = math.inf
    """Lowest score of either side."""
    max_reward: float = -math.inf
    """Highest score of either side."""
    decided: float = 0.0
    """Sum of the weights of pairs that have a winner."""
    squared_error: float = 0.0
    """Sum of weight x (score foretold - score given)^2."""
    rated: float = 0.0
    """Sum of the weights of scored completions."""
    tokens: int = 0
    """Tokens of both sides, shared ones counted twice: TRL's `num_tokens`."""
    tokens_computed: int = 0
    """Tokens that went through the model."""

    @classmethod
    def of(
        cls,
        chosen: npt.ArrayLike,
        rejected: npt.ArrayLike,
        *,
        loss: float = 0.0,
        weights: npt.ArrayLike | None = None,
        tokens: int = 0,
        tokens_computed: int = 0,
    ) -> StepMetrics:
        """Metrics of some pairs.

        Args:
            chosen, rejected: scores, [pairs].
            loss: the sum of the pairs' weighted losses.
            weights: [pairs]; None: 1 each. A pair of weight 0 (a dummy) counts nowhere.
            tokens, tokens_computed: see the fields.
        """
        chosen_P = np.asarray(chosen, dtype=np.float64).reshape(-1)
        rejected_P = np.asarray(rejected, dtype=np.float64).reshape(-1)
        weight_P = (
            np.ones_like(chosen_P) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
        )
        if not chosen_P.shape == rejected_P.shape == weight_P.shape:
            raise ValueError(
                f"`chosen` {chosen_P.shape}, `rejected` {rejected_P.shape} and `weights` {weight_P.shape}: "
                "give one number for each pair."
            )
        real = weight_P > 0
        chosen_P, rejected_P, weight_P = chosen_P[real], rejected_P[real], weight_P[real]
        both = np.concatenate([chosen_P, rejected_P])
        return cls(
            pairs=float(weight_P.sum()),
            loss=float(loss),
            correct=float(weight_P @ (chosen_P > rejected_P)),
            margin=float(weight_P @ (chosen_P - rejected_P)),
            reward=float(weight_P @ (chosen_P + rejected_P)),
            min_reward=float(both.min(initial=math.inf)),
            max_reward=float(both.max(initial=-math.inf)),
            decided=float(weight_P.sum()),
            tokens=int(tokens),
            tokens_computed=int(tokens_computed),
        )

    def __add__(self, other: StepMetrics) -> StepMetrics:
        return StepMetrics(
            pairs=self.pairs + other.pairs,
            loss=self.loss + other.loss,
            correct=self.correct + other.correct,
            margin=self.margin + other.margin,
            reward=self.reward + other.reward,
            min_reward=min(self.min_reward, other.min_reward),
            max_reward=max(self.max_reward, other.max_reward),
            decided=self.decided + other.decided,
            squared_error=self.squared_error + other.squared_error,
            rated=self.rated + other.rated,
            tokens=self.tokens + other.tokens,
            tokens_computed=self.tokens_computed + other.tokens_computed,
        )

    def to_array(self) -> npt.NDArray[np.float64]:
        """The fields as 12 numbers to send between ranks; `from_arrays` is the way back."""
        return np.array(dataclasses.astuple(self), dtype=np.float64)

    @classmethod
    def from_arrays(cls, arrays: npt.ArrayLike) -> StepMetrics:
        """The metrics of all ranks together, from each rank's `to_array`: [ranks, 12]."""
        total = cls()
        for row in np.atleast_2d(np.asarray(arrays, dtype=np.float64)):
            values: list[Any] = row.tolist()
            total += cls(*values[:-2], *(int(count) for count in values[-2:]))
        return total

    def means(self) -> dict[str, float]:
        """The step's metrics by TRL's names, without prefix; ValueError when there was no row."""
        if self.pairs <= 0:
            raise ValueError(
                "a step without pairs has no metrics: add the metrics of every rank before `means`."
            )
        found = {"loss": self.loss / self.pairs}
        if self.decided > 0:
            found |= {"accuracy": self.correct / self.decided, "margin": self.margin / self.decided}
        found |= {
            "mean_reward": self.reward / (2 * self.pairs),
            "min_reward": self.min_reward,
            "max_reward": self.max_reward,
        }
        return found | ({"mse": self.squared_error / self.rated} if self.rated > 0 else {})


class IntervalMean:
    """The mean over a logging interval of each step's metrics; every step weighs the same, as in TRL."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in one step's metrics; a name may be absent from some steps."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def __len__(self) -> int:
        """Steps since the last `take`."""
        return max(self._counts.values(), default=0)

    def take(self) -> dict[str, float]:
        """The means since the last call, in the order the names first came; starts a new interval."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
