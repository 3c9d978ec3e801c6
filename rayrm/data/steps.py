"""What the loop trains on: steps from a cursor on, of a tokenized set or of a stream. No ray.

`TrainSteps` is what a rank is given; `IndexedSteps` derives each step from the order of the whole set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rayrm.data.order import Cursor, Order, Places
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import DataError

if TYPE_CHECKING:
    from rayrm.data.tokenized_set import TokenizedSet


class Step(Protocol):
    """One optimizer step of R rows. `epoch` is the progress after it; None where nothing tells."""

    @property
    def index(self) -> RowIndex: ...

    @property
    def after(self) -> Cursor: ...

    @property
    def epoch(self) -> float | None: ...

    def fetch(self, rows: Sequence[int]) -> list[TokenizedRow]:
        """Rows of the step by their places in it, 0 .. R - 1."""
        ...


class TrainSteps(Protocol):
    """Steps without end from any cursor on. `steps_per_epoch` is None where nobody knows."""

    @property
    def steps_per_epoch(self) -> int | None: ...

    def read_ahead(self, cursor: Cursor) -> None:
        """Begin to read what `steps` of this cursor will give, where it must be read; waits for nothing."""
        ...

    def steps(self, cursor: Cursor) -> Iterator[Step]: ...


@dataclass(frozen=True, slots=True)
class IndexedStep:
    """A step of a set: its rows' places there."""

    train_set: TokenizedSet
    rows: Places
    index: RowIndex
    after: Cursor
    epoch: float

    def fetch(self, rows: Sequence[int]) -> list[TokenizedRow]:
        return self.train_set.fetch(self.rows[list(rows)])


@dataclass(frozen=True, slots=True)
class IndexedSteps:
    """The steps of a tokenized set in an order of all its rows; every rank derives them for itself."""

    train_set: TokenizedSet
    order: Order

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def read_ahead(self, cursor: Cursor) -> None:
        pass

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        if cursor.piece or cursor.skip:
            raise DataError(
                f"the checkpoint stands at step {cursor.step} of a stream, and this run is indexed; set "
                '`data.mode="streaming"`, or begin anew'
            )
        per_epoch = self.order.steps_per_epoch
        for step in self.order.steps(cursor):
            done = step.after.epoch * per_epoch + step.after.step
            index = self.train_set.index.take(step.rows)
            yield IndexedStep(self.train_set, step.rows, index, step.after, done / per_epoch)
