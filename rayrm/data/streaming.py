"""[RAY] A source that is trained on while it is read: what is known of it before, and its dispatcher.

Only the beginning is read here, in this process: enough to know the rows' form, to refuse a source that is
bad at once, and to have rows by which a run measures its memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.data.blocks import index_of
from rayrm.data.cache import rules_of
from rayrm.data.dispatcher import StreamPlan
from rayrm.data.ingest import check_one_form, reading_of
from rayrm.data.labels import USUAL, LabelRules
from rayrm.data.order import StreamOrder
from rayrm.data.pieces import DatasetPart, Piece, Shard, StreamShard
from rayrm.data.preference import PairForm
from rayrm.data.quarantine import RefusalWatch
from rayrm.data.reading import Reading, raise_if_stopped
from rayrm.data.refusals import RefusalLog
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.sources import plan_sources
from rayrm.data.stream_steps import StreamedSteps, streamed
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import DataError
from rayrm.own_ray import ensure_ray

_SAMPLE_ROWS = 256


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What is known of a stream before it is read. `fingerprint`: of the pieces' names and sizes, and of
    the rules that make rows of them."""

    name: str
    text_form: PairForm
    fingerprint: str


@dataclass(frozen=True, slots=True)
class StreamSource:
    """A source as pieces to read; `sample` are rows of its beginning and one as long as any can be."""

    report: StreamReport
    names: list[str]
    groups: list[str]
    pieces: list[Piece]
    weights: tuple[float, ...]
    reading: Reading
    sample: TokenizedSet

    @contextmanager
    def started(
        self,
        *,
        rows_per_step: int,
        num_ranks: int,
        seed: int,
        window: int,
        shuffle: bool,
        drop_last: bool,
        quarantine_path: Path,
        max_bad_row_fraction: float,
        max_tasks: int | None,
    ) -> Iterator[StreamedSteps]:
        """The steps of a run, read by an actor that lives as long as the block."""
        ensure_ray()
        max_tasks = max_tasks or _tasks_at_once()
        order = StreamOrder(self.weights, rows_per_step, seed, window, shuffle, drop_last)
        watch = RefusalWatch(self.report.name, self.groups, max_bad_row_fraction, quarantine_path)
        refusals = RefusalLog(self.names, quarantine_path, watch)
        form = self.report.text_form
        plan = StreamPlan(self.pieces, self.names, self.reading, order, refusals, form, max_tasks)
        with streamed(plan, self.sample, num_ranks) as steps:
            yield steps


def open_stream(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int,
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    shuffle: bool = True,
    selection: Selection = EVERY_ROW,
    token_cache: str | None = None,
    name: str = "train",
    labels: LabelRules = USUAL,
) -> StreamSource:
    """Plan the pieces of a source and read its first rows.

    Raises `DataError`: a source that is missing or unreadable, has no row at its beginning that can be used,
    or mixes text forms there.
    """
    plan = plan_sources(
        source, max_rows=max_rows, name=name, columns=columns, contiguous=not shuffle, streaming=True
    )
    if not plan.work:
        raise DataError(f"{name} has no rows; give a source that has some")
    reading = reading_of(
        tokenizer, max_length=max_length, selection=selection, token_cache=token_cache, labels=labels
    )
    rows, form = _beginning(name, plan.names, plan.work, reading)
    weights = tuple(plan.weights[piece.source] for piece in plan.work)
    sample = TokenizedSet.from_rows([*rows, _longest_row(max_length)], name)
    rules = rules_of(
        tokenizer, versions=False, max_length=max_length, selection=selection.rules, **labels.named
    )
    report = StreamReport(name, form, _fingerprint(plan.work, weights, rules))
    return StreamSource(report, plan.names, plan.group_names, plan.work, weights, reading, sample)


def _tasks_at_once() -> int | None:
    """As many as there are cores: more would only slow down the piece that the first step waits for.

    None: Ray Data decides. A Ray of this machine alone may count more CPUs than there are.
    """
    import ray

    return os.cpu_count() if len(ray.nodes()) == 1 else None


def _beginning(
    name: str, names: list[str], pieces: list[Piece], reading: Reading
) -> tuple[list[TokenizedRow], PairForm]:
    """The first rows that can be used, and their form."""
    refusals = []
    # Not through the cache: it keeps whole pieces only, and hashes them before the first row is seen.
    reading = replace(reading, cache=None)
    tables = (table for piece in pieces for table in reading.tables(piece))
    for table in islice(tables, 8):
        index = index_of(table)
        raise_if_stopped(index)
        refusals += index.refusals
        if len(index.row):
            check_one_form(names, [index])
            rows = TokenizedSet.of_table(table).fetch(np.arange(min(len(index.row), _SAMPLE_ROWS)))
            return rows, next(iter(index.forms))
    raise DataError(
        f"no row of the beginning of {name} can be used"
        + (f": {refusals[0].message}" if refusals else "; give a source that has some")
    )


def _longest_row(max_length: int) -> TokenizedRow:
    """A pair of sides as long as they may be, with nothing in common: the most a pair can cost."""
    return TokenizedRow.pair(np.zeros(max_length, np.int32), np.ones(max_length, np.int32))


def _fingerprint(pieces: list[Piece], weights: tuple[float, ...], rules: str) -> str:
    content = hashlib.sha256(f"{weights} {rules}".encode())
    for piece in pieces:
        content.update(repr(_named(piece)).encode())
    return content.hexdigest()


def _named(piece: Piece) -> Any:
    if isinstance(piece, Shard):
        return replace(piece, path=Path(piece.path).name, mtime_ns=None, remote=None)
    if isinstance(piece, StreamShard):
        # What it is pickled to is another in every process.
        return (piece.source, piece.name, piece.columns, *(() if piece.stop is None else (piece.stop,)))
    if isinstance(piece, DatasetPart):
        return piece.source, piece.name, piece.columns, piece.start, piece.num_rows, piece.num_bytes
    return hashlib.sha256(piece.pickled).hexdigest(), piece.start, piece.columns
