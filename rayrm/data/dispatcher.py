"""[RAY] One actor reads a stream ahead of its ranks, and hands out steps as references into the object store.

    Ray Data reads and tokenizes pieces, in order -> StreamCutter -> steps -> each rank takes each step

Restartable: the actor keeps nothing that a cursor does not tell. A rank asks for the step after a cursor; an
actor that has just been started, or is asked for a step it no longer has, begins to read at that cursor. It
stays a window ahead, at least four steps, and reads no further until they are taken: memory is that of two
windows and of Ray Data's own limit, whatever the size of the source.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from rayrm.data.blocks import BlockIndex, index_of
from rayrm.data.ingest import quiet_context
from rayrm.data.order import Cursor, StreamOrder
from rayrm.data.pieces import Piece
from rayrm.data.preference import PairForm
from rayrm.data.reading import Reading, raise_if_stopped
from rayrm.data.refusals import RefusalLog
from rayrm.data.sources import row_name
from rayrm.data.stream import StreamCutter, StreamStep
from rayrm.errors import DataError, RayrmError

_POSITION = "__rayrm_position__"
_BUFFER_BYTES = 256 * 2**20
"""What Ray Data may hold of blocks that are read and not yet taken."""
_BLOCK_BYTES = 2**18
"""Small: a task gives its rows a table at a time, so that the first step does not wait for a whole piece."""
_STEPS_KEPT = 16
"""Steps that were taken and are kept for ranks that are behind."""
_ATTEMPTS = 5
_FIRST_PIECES = 64
_PIECES_AT_ONCE = 1024
PATIENCE_S = 600.0
_log = logging.getLogger("rayrm.data")


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What the dispatcher is told once: the pieces, how to read them, and their order."""

    pieces: list[Piece]
    names: list[str]
    reading: Reading
    order: StreamOrder
    refusals: RefusalLog
    text_form: PairForm
    max_tasks: int | None = None


@dataclass(slots=True)
class _Run:
    """One reading of the stream, from a cursor on. `ready` is keyed by the cursor before a step."""

    tail: Cursor
    ready: OrderedDict[Cursor, StreamStep] = field(default_factory=OrderedDict)
    asked: Cursor = field(default_factory=Cursor)
    error: Exception | None = None
    stopped: bool = False

    def gives(self, cursor: Cursor) -> bool:
        """Whether the step after `cursor` is here or comes yet."""
        return cursor in self.ready or cursor >= self.tail

    def lacks(self, cursor: Cursor, lost: frozenset[str]) -> bool:
        """Whether the step after `cursor` is here, and a block of it is `lost`."""
        return cursor in self.ready and any(block.hex() in lost for block in self.ready[cursor].blocks)

    def num_ahead(self) -> int:
        return sum(before > self.asked for before in self.ready)


class Dispatcher:
    """The actor's class; its methods run in threads, one for each rank that waits."""

    def __init__(self) -> None:
        self._plan_ref: Any = None
        self._changed = threading.Condition()
        self._run: _Run | None = None
        # Ray Data's settings are the process's, and a reading that was left may still be beginning.
        self._beginning = threading.Lock()

    def step(self, cursor: Cursor, plan: list[Any], lost: frozenset[str] = frozenset()) -> StreamStep:
        """The step after `cursor` of the `StreamPlan` that `plan` refers to; waits until it is read.

        A step with one of the `lost` blocks is read anew. Raises what reading raised. The plan comes with
        each call, so that a restarted actor has it.
        """
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            self._plan_ref = plan[0]
            while True:
                run = self._run
                if run is None or not run.gives(cursor) or run.lacks(cursor, lost):
                    run = self._begin(cursor)
                if cursor > run.asked:
                    # Also of a step that is not read yet: what lies before it is waited for by nobody.
                    run.asked = cursor
                    self._changed.notify_all()
                if cursor in run.ready:
                    return run.ready[cursor]
                if run.error is not None:
                    if not isinstance(run.error, RayrmError):
                        self._run = None  # storage that did not answer may answer the next attempt
                    raise run.error
                if not self._changed.wait(timeout=deadline - time.monotonic()):
                    raise DataError(
                        f"no step could be read of the stream in {PATIENCE_S:.0f} s: its tasks wait for a "
                        "CPU beside the training workers, or its storage does not answer. Free a CPU, or "
                        'set data.mode="indexed".'
                    )

    def num_ahead(self) -> int:
        """Steps that are ready and that no rank has asked for yet."""
        with self._changed:
            return 0 if self._run is None else self._run.num_ahead()

    def counts(self) -> list[str]:
        """What was read, kept and refused of each source since this actor was started."""
        return self._plan.refusals.watch.lines() if self._plan_ref is not None else []

    def process(self) -> int:
        """The actor's process id."""
        return os.getpid()

    @functools.cached_property
    def _plan(self) -> StreamPlan:
        import ray

        plan: StreamPlan = ray.get(self._plan_ref)
        return plan

    def _begin(self, cursor: Cursor) -> _Run:
        if self._run is not None:
            self._run.stopped = True
        run = self._run = _Run(tail=cursor, asked=cursor)
        threading.Thread(target=self._read, args=(run,), daemon=True, name="rayrm-stream").start()
        self._changed.notify_all()
        return run

    def _read(self, run: _Run) -> None:
        from ray.exceptions import ObjectLostError

        attempts, stood = 0, run.tail
        while True:
            try:
                self._cut(run)
                return
            # What ends the reading, whatever it is, must reach the ranks: they wait for the next step.
            except Exception as error:
                # Counted since the last step that was given: nodes may come and go for weeks.
                attempts, stood = (attempts + 1 if stood == run.tail else 1), run.tail
                if not isinstance(error, ObjectLostError) or attempts > _ATTEMPTS:
                    with self._changed:
                        run.error = error
                        self._changed.notify_all()
                    return
                # Blocks went with their node before they were looked at.
                _log.warning("blocks of the stream were lost (%s), reading them again", type(error).__name__)
                time.sleep(attempts - 1)

    def _cut(self, run: _Run) -> None:
        """Give the run its steps from where they end, epoch after epoch."""
        cutter = StreamCutter(self._plan.order, run.tail)
        while not run.stopped:
            begin, num_steps = cutter.cursor, 0
            for position, share, block, index in self._blocks(run, cutter.cursor):
                for step in cutter.add(position, share, block, index):
                    num_steps += 1
                    self._put(run, step)
                if run.stopped:
                    return
            for step in cutter.end_epoch():
                num_steps += 1
                self._put(run, step)
            if begin == Cursor(begin.epoch):
                self._plan.refusals.finish_epoch()
                if not num_steps:
                    raise DataError(
                        "`dataloader_drop_last` (True): an epoch of the stream has fewer rows than a "
                        f"step ({self._plan.order.rows_per_step}), and they are left out. Set it to False"
                    )

    def _put(self, run: _Run, step: StreamStep) -> None:
        most = max(4, self._plan.order.steps_per_window)
        with self._changed:
            while run.num_ahead() >= most and not run.stopped:
                self._changed.wait()
            # Where an epoch ended with a window, the step before it named its end otherwise.
            run.ready[run.tail] = replace(step, before=run.tail)
            run.tail = step.after
            taken = [before for before in run.ready if before < run.asked]
            for before in taken[:-_STEPS_KEPT]:
                del run.ready[before]
            self._changed.notify_all()

    def _blocks(self, run: _Run, cursor: Cursor) -> Iterator[tuple[int, float, Any, BlockIndex]]:
        """The blocks of the epoch's pieces from the cursor's on, in order, each with its index.

        The index is made here, though it takes the block: 2% of the time that tokenizing it took, where a
        task for each block would keep processes starting and ending.
        """
        import ray

        pieces = self._plan.order.pieces(cursor.epoch)
        for bundle in self._tables(run, cursor, pieces):
            for block in bundle.block_refs:
                position, index = _index_of_position(ray.get(block))
                if position is not None:
                    self._check(index)
                    yield position, pieces[position][1], block, index
            if run.stopped:
                return

    def _check(self, index: BlockIndex) -> None:
        """Count what a block holds. Raises what ends the reading."""
        raise_if_stopped(index)
        for form, (source, row) in index.forms.items():
            if form != self._plan.text_form:
                raise DataError(
                    f"{row_name(self._plan.names[source], row)} is {form}, and the stream began with "
                    f"{self._plan.text_form} rows; a model learns one form; convert the rows to one form, or "
                    "train on one part"
                )
        self._plan.refusals.add(index)

    def _tables(self, run: _Run, cursor: Cursor, pieces: list[tuple[int, float]]) -> Iterator[Any]:
        """Ray Data's bundles of tokenized blocks, in order.

        Ray Data makes an object and a task of each piece before the first runs: it is given some at a time,
        few at first, so that a source of any number of pieces starts at once.
        """
        begin, at_once = cursor.piece, _FIRST_PIECES
        while begin < len(pieces) and not run.stopped:
            end = min(begin + at_once, len(pieces))
            yield from self._tables_between(begin, end, pieces)
            begin, at_once = end, _PIECES_AT_ONCE

    def _tables_between(self, begin: int, end: int, pieces: list[tuple[int, float]]) -> Iterator[Any]:
        import ray
        from ray.data import ExecutionResources, TaskPoolStrategy

        items = [
            {"position": position, "piece": pickle.dumps(self._plan.pieces[pieces[position][0]])}
            for position in range(begin, end)
        ]
        with self._beginning, quiet_context(_BLOCK_BYTES) as context:
            kept_order = context.execution_options.preserve_order
            limits = context.execution_options.resource_limits
            context.execution_options.preserve_order = True
            context.execution_options.resource_limits = ExecutionResources(object_store_memory=_BUFFER_BYTES)
            try:
                work = ray.data.from_items(items, override_num_blocks=len(items))
                read = work.map_batches(
                    _ReadPieces(self._plan.reading),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=TaskPoolStrategy(size=min(self._plan.max_tasks or len(items), len(items))),
                )
                bundles = read.iter_internal_ref_bundles()
            finally:
                context.execution_options.preserve_order = kept_order
                context.execution_options.resource_limits = limits
        yield from bundles


@dataclass(frozen=True, slots=True)
class _ReadPieces:
    """A task's work; what it yields knows the place of its piece in the epoch."""

    reading: Reading

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            for table in self.reading.tables(pickle.loads(row["piece"])):
                position = pa.repeat(pa.scalar(row["position"], pa.int64()), len(table))
                yield table.append_column(_POSITION, position)


def _index_of_position(table: pa.Table) -> tuple[int | None, BlockIndex]:
    if not len(table):
        return None, index_of(table)
    first, last = (table.column(_POSITION)[place].as_py() for place in (0, len(table) - 1))
    assert first == last, "Ray Data joined blocks of two pieces"
    return first, index_of(table)
