"""[RAY] The steps of a stream as a rank takes them: asked of the dispatcher, fetched from the object store.

Pickles small, for Ray Train's workers. Blocks that were lost are asked for anew; a dispatcher that does not
answer is an error in the end, not a wait for ever.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rayrm.data.blocks import RowBlock
from rayrm.data.dispatcher import PATIENCE_S, Dispatcher, StreamPlan
from rayrm.data.order import Cursor
from rayrm.data.row_index import RowIndex
from rayrm.data.sources import row_name
from rayrm.data.stream import StreamStep
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import DataError

_OPEN_BLOCKS = 16
_PATIENCE_S = 2.5 * PATIENCE_S
"""Longer than an actor needs that is restarted after it waited for its storage."""
_LAST_WORD_S = 10.0
_log = logging.getLogger("rayrm.data")


@dataclass(slots=True)
class TakenStep:
    """A step as a rank holds it: fetches from the object store, and asks anew where blocks were lost."""

    told: StreamStep
    stream: StreamedSteps

    @property
    def index(self) -> RowIndex:
        return self.told.index

    @property
    def after(self) -> Cursor:
        return self.told.after

    @property
    def epoch(self) -> float | None:
        return self.told.epoch

    def fetch(self, rows: Sequence[int]) -> list[TokenizedRow]:
        from ray.exceptions import ObjectLostError

        for attempt in range(5):
            try:
                return self.stream.fetch(self.told, rows)
            except ObjectLostError as error:
                # The blocks went with the actor that read them, or with a node: its successor reads them.
                _log.warning("blocks of a step were lost (%s), reading them again", type(error).__name__)
                time.sleep(attempt)
                self.told = self.stream.ask(self.told.before, lost=self.told)
        return self.stream.fetch(self.told, rows)


@dataclass(slots=True)
class StreamedSteps:
    """The steps of a stream, asked of its dispatcher; pickles small, for Ray Train's workers.

    `plan`: a reference to the `StreamPlan`. `sample`: a few rows of the stream, and one as long as rows can
    be, by which a run measures its memory. `names`: of the sources.
    """

    actor: Any
    plan: Any
    sample: TokenizedSet
    names: list[str]
    _open: OrderedDict[Any, RowBlock] = field(default_factory=OrderedDict, repr=False)
    _asked: tuple[Cursor, Any] | None = field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> None:
        return None

    def read_ahead(self, cursor: Cursor) -> None:
        self._asked = cursor, self.actor.step.remote(cursor, [self.plan])

    def steps(self, cursor: Cursor) -> Iterator[TakenStep]:
        while True:
            told = self.ask(cursor)
            yield TakenStep(told, self)
            cursor = told.after

    def ask(self, cursor: Cursor, lost: StreamStep | None = None) -> StreamStep:
        """The step after `cursor`; with blocks of its own where those of `lost` are no more.

        Raises `DataError` for what ended the reading.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        before, self._asked = self._asked, None
        if before is not None and before[0] == cursor and lost is None:
            asked = before[1]
        else:
            blocks = frozenset(block.hex() for block in lost.blocks) if lost is not None else frozenset()
            asked = self.actor.step.remote(cursor, [self.plan], blocks)
        try:
            step: StreamStep = ray.get(asked, timeout=_PATIENCE_S)
        except GetTimeoutError as error:
            raise DataError(
                f"the actor that reads the stream gave no step in {_PATIENCE_S:.0f} s: its process is "
                "lost each time it is started (often for want of memory: see Ray's logs). Free memory on its "
                "node, then type the same command: the run goes on from its last checkpoint."
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        return step

    def fetch(self, step: StreamStep, rows: Sequence[int]) -> list[TokenizedRow]:
        """Rows of a step by their places in it."""
        import ray

        needed = {step.blocks[step.block_of[row]] for row in rows}
        absent = [block for block in needed if block not in self._open]
        for block, table in zip(absent, ray.get(absent), strict=True):
            self._open[block] = RowBlock(table)
        found = [self._open[step.blocks[step.block_of[row]]].row(int(step.offset[row])) for row in rows]
        while len(self._open) > max(_OPEN_BLOCKS, len(needed)):
            self._open.popitem(last=False)
        return found

    def name_of(self, row: TokenizedRow) -> str:
        """What messages call a row of the stream: its file and line."""
        source, number = row.place
        return row_name(self.names[source], number)

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedSteps, (self.actor, self.plan, self.sample, self.names)


@contextmanager
def streamed(plan: StreamPlan, sample: TokenizedSet, num_ranks: int) -> Iterator[StreamedSteps]:
    """The steps of a plan by a new actor, which is restarted where it is lost and ends with the block."""
    import ray

    actor = (
        ray.remote(Dispatcher)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4 * num_ranks + 8,
            scheduling_strategy="DEFAULT",
        )
        .remote()
    )
    try:
        yield StreamedSteps(actor, ray.put(plan), sample, plan.names)
    finally:
        for line in _counted(actor):
            _log.info("%s", line)
        ray.kill(actor)


def _counted(actor: Any) -> list[str]:
    """What the stream's actor has counted, if it still answers."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        lines: list[str] = ray.get(actor.counts.remote(), timeout=_LAST_WORD_S)
    except (RayError, GetTimeoutError):
        return []
    return [f"the stream of {line}" if number == 0 else line for number, line in enumerate(lines)]
