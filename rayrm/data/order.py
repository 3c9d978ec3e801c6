"""Which rows make step k of epoch e. Pure: a cursor goes in, steps come out.

Two orders, each a function of (seed, epoch) and of the data alone: not of worker count, timing or restarts.
`Order` permutes a set whose size is known, as TRL's trainer does. `StreamOrder` permutes pieces of a source
(files, parts of files) that are read one after another, and the rows of each window of that stream; a step
needs no row before its window, so that a run goes on from where the window begins. Cost: `Order` 8 bytes a
row, `StreamOrder` none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
_STEPS_IN_WINDOW = 4


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """The next step to train: `step` counts from 0 within `epoch`.

    In a stream the step's window begins in the epoch's piece number `piece`, after `skip` of its rows.
    """

    epoch: int = 0
    step: int = 0
    piece: int = 0
    skip: int = 0


@dataclass(frozen=True, slots=True)
class StepRows:
    """One optimizer step: which rows, in order, and the cursor that stands after it."""

    rows: Places
    after: Cursor


@dataclass(frozen=True, slots=True)
class Part:
    """`num_rows` consecutive rows that an epoch shows `weight` times: 2 is twice, 0.5 every second row.

    A fraction takes another share of the rows each epoch, until all had their turn.
    """

    num_rows: int
    weight: float = 1.0

    @property
    def rows_per_epoch(self) -> int:
        return round(self.num_rows * self.weight)

    def rows(self, seed: int, epoch: int, number: int) -> Places:
        """What `epoch` shows of the part, as places in it; `number` tells parts apart."""
        times, rest = divmod(self.rows_per_epoch, self.num_rows) if self.num_rows else (0, 0)
        every = np.tile(np.arange(self.num_rows), times)
        if not rest:
            return every
        turn = np.random.default_rng([seed, number, 1]).permutation(self.num_rows)
        return np.concatenate([every, turn[(epoch * rest + np.arange(rest)) % self.num_rows]])


@dataclass(frozen=True, slots=True)
class Order:
    """`num_rows` rows in steps of `rows_per_step`; `shuffle=False` keeps the data's own order.

    `parts` (of a mixture) make up the rows, one after another; none: all rows once an epoch.
    """

    num_rows: int
    rows_per_step: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        return sum(part.rows_per_epoch for part in self.parts) if self.parts else self.num_rows

    @property
    def steps_per_epoch(self) -> int:
        if self.drop_last:
            return self.rows_per_epoch // self.rows_per_step
        return math.ceil(self.rows_per_epoch / self.rows_per_step)

    def epoch_rows(self, epoch: int) -> Places:
        """All rows of `epoch` in its order, int64 `[rows_per_epoch]`."""
        chosen = self._chosen(epoch)
        if not self.shuffle:
            return np.sort(chosen)
        import torch  # what this module is to the packing of rows has no need of it

        # As transformers' Trainer orders a set: accelerate's SeedableRandomSampler (1.15, data_loader.py).
        drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(self.seed + epoch))
        return np.asarray(chosen[drawn.numpy()])

    def _chosen(self, epoch: int) -> Places:
        if all(part.weight == 1 for part in self.parts):
            return np.arange(self.num_rows, dtype=np.int64)
        starts = np.cumsum([0, *(part.num_rows for part in self.parts)])
        return np.concatenate(
            [
                start + part.rows(self.seed, epoch, n)
                for n, (start, part) in enumerate(zip(starts, self.parts, strict=False))
            ]
        ).astype(np.int64)

    def steps(self, cursor: Cursor = Cursor()) -> Iterator[StepRows]:
        """The steps from `cursor` on, epoch after epoch, without end; the caller decides where to stop."""
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"no step can be made of {self.rows_per_epoch} rows at {self.rows_per_step} rows a step"
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


@dataclass(frozen=True, slots=True)
class StreamOrder:
    """`weights` `[P]` of P pieces; rows in steps of `rows_per_step`, shuffled in windows of `window` rows.

    Windows hold whole steps, and at least four, so that the next steps are known before the window ends.
    """

    weights: tuple[float, ...]
    rows_per_step: int
    seed: int
    window: int
    shuffle: bool = True
    drop_last: bool = False

    @property
    def steps_per_window(self) -> int:
        return max(_STEPS_IN_WINDOW, math.ceil(self.window / self.rows_per_step))

    @property
    def rows_per_window(self) -> int:
        return self.steps_per_window * self.rows_per_step

    def pieces(self, epoch: int) -> list[tuple[int, float]]:
        """The pieces that `epoch` reads, in its order, each with the share of its rows that is taken."""
        read: list[tuple[int, float]] = []
        for piece, weight in enumerate(self.weights):
            whole, rest = divmod(weight, 1.0)
            read += [(piece, 1.0)] * int(whole) + ([(piece, rest)] if rest else [])
        if not self.shuffle:
            return read
        return [read[place] for place in np.random.default_rng([self.seed, epoch]).permutation(len(read))]

    def taken(self, epoch: int, share: float, source: Places, row: Places) -> npt.NDArray[np.bool_]:
        """Which rows of a piece, by their places in the data, `epoch` takes of a `share` of them, bool `[R]`.

        Epoch by epoch the share moves on: a row of weight 0.5 has its turn every second time.
        """
        if share >= 1:
            return np.ones(len(row), dtype=np.bool_)
        turn = (_uniform(self.seed, source, row) + epoch * share) % 1.0
        return np.less(turn, share)

    def window_rows(self, epoch: int, window: int, num_rows: int) -> Places:
        """The order of a window's rows, int64 `[num_rows]`."""
        if not self.shuffle:
            return np.arange(num_rows, dtype=np.int64)
        return np.random.default_rng([self.seed, epoch, window, 1]).permutation(num_rows).astype(np.int64)


def _uniform(seed: int, source: Places, row: Places) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each place: splitmix64 (Steele, Lea and Flood, 2014) of it and the seed."""
    with np.errstate(over="ignore"):
        z = row.astype(np.uint64) + source.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z * np.uint64(0xD1342543DE82EF95) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.asarray((z >> np.uint64(11)).astype(np.float64) / float(1 << 53))
