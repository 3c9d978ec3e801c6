"""Blocks of a stream, as they are read -> the steps of its order. Pure: no ray, no thread, no file.

    blocks in the order of the pieces -> window (rows_per_window rows) -> permuted -> steps

Laws, each a test: the steps do not depend on where blocks are cut; begun at any step's cursor they are the
steps that follow; each row of an epoch stands in one step. Cost: what a window's rows are known by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayrm.data.blocks import BlockIndex
from rayrm.data.order import Cursor, Places, StreamOrder
from rayrm.data.row_index import RowIndex
from rayrm.errors import DataError


@dataclass(frozen=True, slots=True)
class StreamStep:
    """One optimizer step of R rows: their index, and where their ids lie. Produced by the dispatcher,
    consumed by every rank.

    Row r is row `offset[r]` of `blocks[block_of[r]]`, a reference to a table. `epoch` is the progress after
    the step, in epochs: whole ones, and the share of the current one's pieces that was begun. None: the
    stream is one piece, which tells no share.
    """

    index: RowIndex
    blocks: list[Any]
    block_of: Places
    offset: Places
    before: Cursor
    after: Cursor
    epoch: float | None


@dataclass(slots=True)
class _Held:
    """Rows of one block that wait for their window."""

    block: Any
    index: RowIndex
    offset: Places
    position: int
    first: int  # of the piece's taken rows, the number of the first here


@dataclass(slots=True)
class StreamCutter:
    """Cuts what is read from `cursor` on into steps; give it the blocks of `order.pieces(epoch)` in order."""

    order: StreamOrder
    cursor: Cursor
    _held: list[_Held] = field(default_factory=list)
    _num_held: int = 0
    _position: int = -1
    _seen: int = 0  # taken rows of the piece at `_position`
    _done: int = 0  # steps of the first window that were trained before
    _num_pieces: int = 1

    def __post_init__(self) -> None:
        self._num_pieces = len(self.order.pieces(self.cursor.epoch))
        beyond = self.cursor.step >= self.order.steps_per_window
        if beyond and not (self.cursor.piece or self.cursor.skip):
            raise DataError(
                f"the checkpoint stands at step {self.cursor.step} of an indexed set, and this run streams; "
                'set `data.mode="indexed"`, or begin anew'
            )
        self._done = self.cursor.step % self.order.steps_per_window

    def add(self, position: int, share: float, block: Any, index: BlockIndex) -> Iterator[StreamStep]:
        """The steps that are whole with this block, the next of the epoch's piece number `position`."""
        assert position >= self._position, "blocks came out of order"
        if position != self._position:
            self._position, self._seen = position, 0
        taken = np.flatnonzero(self.order.taken(self.cursor.epoch, share, index.source, index.row))
        first, self._seen = self._seen, self._seen + len(taken)
        if position == self.cursor.piece:  # where a run goes on within a piece; later there is none to skip
            skipped = min(max(self.cursor.skip - first, 0), len(taken))
            taken, first = taken[skipped:], first + skipped
        if not len(taken):
            return
        self._held.append(_Held(block, index.rows.take(taken), index.offset[taken], position, first))
        self._num_held += len(taken)
        while self._num_held >= self.order.rows_per_window:
            yield from self._cut(self.order.rows_per_window, last=False)

    def end_epoch(self) -> Iterator[StreamStep]:
        """The steps of the rows that are left; after them the next epoch begins."""
        num_rows = self._num_held
        if self.order.drop_last:
            num_rows -= num_rows % self.order.rows_per_step
        if num_rows:
            yield from self._cut(num_rows, last=True)
        self._held, self._num_held, self._position, self._done = [], 0, -1, 0
        self.cursor = Cursor(self.cursor.epoch + 1)

    def _cut(self, num_rows: int, *, last: bool) -> Iterator[StreamStep]:
        order, start = self.order, self.cursor
        window = start.step // order.steps_per_window
        held = self._take(num_rows)
        index = RowIndex.joined([part.index for part in held])
        block_of = np.repeat(np.arange(len(held)), [len(part.offset) for part in held])
        offset = np.concatenate([part.offset for part in held])
        rows = order.window_rows(start.epoch, window, num_rows)
        num_steps = -(-num_rows // order.rows_per_step)
        begin = window * order.steps_per_window
        if self._held:
            following = (self._held[0].position, self._held[0].first)
        else:
            following = (held[-1].position, held[-1].first + len(held[-1].offset))
        for number in range(self._done, num_steps):
            chosen = rows[number * order.rows_per_step : (number + 1) * order.rows_per_step]
            needed, block_at = np.unique(block_of[chosen], return_inverse=True)
            before = Cursor(start.epoch, begin + number, start.piece, start.skip)
            if number + 1 < num_steps:
                after = Cursor(start.epoch, begin + number + 1, start.piece, start.skip)
            elif last:
                after = Cursor(start.epoch + 1)
            else:
                after = Cursor(start.epoch, begin + num_steps, *following)
            yield StreamStep(
                index.take(chosen),
                [held[part].block for part in needed],
                block_at,
                offset[chosen],
                before,
                after,
                self._progress(after),
            )
        self._done = 0
        self.cursor = Cursor(start.epoch, begin + num_steps, *following)

    def _progress(self, after: Cursor) -> float | None:
        if self._num_pieces == 1:
            return None
        return after.epoch + min(after.piece / self._num_pieces, 1.0)

    def _take(self, num_rows: int) -> list[_Held]:
        """The first rows held; a block that reaches beyond them is parted."""
        taken: list[_Held] = []
        self._num_held -= num_rows
        while num_rows:
            head = self._held[0]
            count = len(head.offset)
            if count <= num_rows:
                taken.append(self._held.pop(0))
                num_rows -= count
                continue
            here, rest = np.arange(num_rows), np.arange(num_rows, count)
            taken.append(
                _Held(head.block, head.index.take(here), head.offset[here], head.position, head.first)
            )
            self._held[0] = _Held(
                head.block,
                head.index.take(rest),
                head.offset[rest],
                head.position,
                head.first + num_rows,
            )
            num_rows = 0
        return taken
