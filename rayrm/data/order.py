"""Which rows make step k of epoch e. Pure: a cursor goes in, steps come out.

The order is one global permutation per epoch, a function of (seed, epoch) alone: not of worker count, timing
or restarts. So a position in training is two numbers, and resuming is starting at them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next step to train: `step` counts from 0 within `epoch`."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class StepRows:
    """One optimizer step: which rows, in order, and the cursor that stands after it."""

    rows: npt.NDArray[np.int64]
    after: Cursor


@dataclass(frozen=True, slots=True)
class Order:
    """`num_rows` rows in steps of `rows_per_step`; `shuffle=False` keeps the data's own order."""

    num_rows: int
    rows_per_step: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        if self.drop_last:
            return self.num_rows // self.rows_per_step
        return math.ceil(self.num_rows / self.rows_per_step)

    def epoch_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        """All rows in the order of `epoch`, int64 `[num_rows]`."""
        if not self.shuffle:
            return np.arange(self.num_rows, dtype=np.int64)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows).astype(np.int64)

    def steps(self, cursor: Cursor = Cursor()) -> Iterator[StepRows]:
        """The steps from `cursor` on, epoch after epoch, without end; the caller decides where to stop."""
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"no step can be made of {self.num_rows} rows at {self.rows_per_step} rows a step"
            )
        epoch, step = cursor.epoch, cursor.step
        while True:
            order = self.epoch_rows(epoch)
            while step < self.steps_per_epoch:
                rows = order[step * self.rows_per_step : (step + 1) * self.rows_per_step]
                step += 1
                last = step == self.steps_per_epoch
                yield StepRows(rows, Cursor(epoch + 1, 0) if last else Cursor(epoch, step))
            epoch, step = epoch + 1, 0
