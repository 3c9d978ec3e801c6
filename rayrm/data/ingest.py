"""[RAY] A source of preference rows -> a `TokenizedSet`, read and tokenized in parallel by Ray Data.

The tokenized blocks stay in Ray's object store; the driver keeps an index of about 110 bytes a pair. Rows
stand in the data's own order whatever the number of tasks. Every row is counted: accepted, or refused with a
reason and written to the quarantine file. A bad source raises `DataError` here, before any worker starts.
Cost: the ids, 4 bytes a token with the shared prefix once, in the object store (which spills to disk).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayrm.data.blocks import BlockIndex, index_of
from rayrm.data.columns import check_columns, renamed
from rayrm.data.labels import USUAL, LabelRules
from rayrm.data.pieces import Columns
from rayrm.data.quarantine import RefusalWatch, write_quarantine
from rayrm.data.reading import Reading, is_cacheable, raise_if_stopped, stop_table
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.sources import ROWS_PER_CHUNK, SourceGroup, SourcePlan, SourceRow, plan_sources, row_name
from rayrm.data.tokenized_set import TokenizedSet, assemble
from rayrm.errors import ConfigError, DataError
from rayrm.own_ray import ensure_ray

_log = logging.getLogger("rayrm.data")
_BLOCK_BYTES = (
    4 * 2**20
)  # small enough that fetching random rows moves little, large enough that refs are few
_ROW_NUMBER = "__rayrm_row__"


def ingest(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    max_rows: int | None = None,
    quarantine_path: str | Path | None = None,
    max_bad_row_fraction: float = 0.01,
    max_tasks: int | None = None,
    token_cache: str | None = None,
    name: str = "train",
    selection: Selection = EVERY_ROW,
    columns: Mapping[str, str] | None = None,
    labels: LabelRules = USUAL,
    here: bool = False,
) -> TokenizedSet:
    """All acceptable rows of a source that `selection` takes, tokenized.

    `source`: a path, glob, directory, URL or hub name; a `SourceConfig`; a `datasets.Dataset` or
    `IterableDataset`; a `ray.data.Dataset`; a list of rows; a list of these. `max_rows`: the first rows only.
    `columns`: our fields -> the columns that hold them.
    `max_tasks`: read and tokenize in so many tasks at once (None: the cluster's CPUs). `token_cache`: a
    directory where the tokenized pieces are kept, and taken from where they are there. `selection`: one side
    of a split by prompt, without excluded prompts; rows that it leaves out are counted, and not bad.
    `labels`: which rows the run's loss can use. `here`: in this process alone, which starts no Ray: for
    files that one process tokenizes in less time than Ray's take to start.
    Refused rows are appended to `quarantine_path`; more than `max_bad_row_fraction` of a source's (a row
    above `max_length` is filtered, not bad) raise `DataError` as soon as they are seen, as do a missing,
    unreadable or empty source and one that mixes text forms. A missing chat template is a `ConfigError`.
    """
    reading = reading_of(
        tokenizer, max_length=max_length, selection=selection, token_cache=token_cache, labels=labels
    )
    if here:
        plan = plan_sources(source, max_rows=max_rows, name=name, columns=columns)
        found: Iterator[tuple[Any, BlockIndex]] = (
            (table, index_of(table)) for piece in plan.work for table in reading.tables(piece)
        )
    else:
        ensure_ray()
        plan, tables, cached = _read(source, reading, max_rows, max_tasks, name, columns)
        found = _indexed(tables, cached=cached)
    blocks: list[Any] = []
    indices: list[BlockIndex] = []
    watch = RefusalWatch(name, plan.group_names, max_bad_row_fraction, quarantine_path)
    try:
        with _progress(name) as show:
            for block, index in found:
                raise_if_stopped(index)
                blocks.append(block)
                indices.append(index)
                show(index.num_rows)
                watch.add(index.num_rows_of, index.refusals, index.num_held_out)
        watch.finish()
    finally:
        if quarantine_path is not None:
            refusals = sorted(itertools.chain.from_iterable(index.refusals for index in indices))
            write_quarantine(Path(quarantine_path), plan.names, refusals)
    check_one_form(plan.names, indices)
    tokenized = assemble(
        name, plan.names, blocks, indices, plan.group_of, [group.weight for group in plan.groups]
    )
    tokenized.report = dataclasses.replace(tokenized.report, attributes=labels.attributes)
    for line in [*watch.lines(), *tokenized.shares([group.name for group in plan.groups])]:
        _log.info("%s", line)
    return tokenized


def reading_of(
    tokenizer: Any,
    *,
    max_length: int | None,
    selection: Selection,
    token_cache: str | None,
    labels: LabelRules = USUAL,
) -> Reading:
    """How to read with this tokenizer, also where its class lives in the caller's script."""
    from ray import cloudpickle

    pickled = bytes(cloudpickle.dumps(tokenizer))
    return Reading.of(
        tokenizer,
        pickled,
        max_length=max_length,
        selection=selection,
        token_cache=token_cache,
        labels=labels,
    )


def _read(
    source: Any,
    reading: Reading,
    max_rows: int | None,
    max_tasks: int | None,
    name: str,
    columns: Mapping[str, str] | None,
) -> tuple[SourcePlan, Any, bool]:
    """The sources, the (lazy) Ray dataset of their tokenized blocks, and whether those are in the cache."""
    import ray

    with quiet_context():
        if isinstance(source, ray.data.Dataset):
            run = functools.partial(
                _read_table,
                name=name,
                reading=dataclasses.replace(reading, cache=None),
                columns=check_columns(columns),
            )
            # A batch size gathers tiny blocks into one task.
            tables = _numbered(source, max_rows).map_batches(
                run, batch_size=ROWS_PER_CHUNK, batch_format="pyarrow", concurrency=max_tasks
            )
            return SourcePlan([name], [], [SourceGroup(name)], [0]), tables, False
        plan = plan_sources(source, max_rows=max_rows, name=name, columns=columns)
        if not plan.work:
            raise DataError(f"{name} has no rows; give a source that has some")
        cached = reading.cache is not None and all(map(is_cacheable, plan.work))
        if reading.cache is not None and not cached:
            _log.info("`token_cache` is not used for %s: what it holds is known by reading it only", name)
            reading = dataclasses.replace(reading, cache=None)
        items = [{"work": pickle.dumps(piece)} for piece in plan.work]
        run = functools.partial(_fill_cache if cached else _read_pieces, reading=reading)
        work = ray.data.from_items(items, override_num_blocks=len(items))
        tables = work.map_batches(run, batch_size=None, batch_format="pyarrow", concurrency=max_tasks)
        return plan, tables, cached


def _read_pieces(batch: pa.Table, *, reading: Reading) -> Iterator[pa.Table]:
    for piece in batch.column("work").to_pylist():
        yield from reading.tables(pickle.loads(piece))


def _fill_cache(batch: pa.Table, *, reading: Reading) -> Iterator[pa.Table]:
    """What stands in the cache for each piece, pickled: blocks with their indices, or the error."""
    for piece in batch.column("work").to_pylist():
        try:
            found: Any = reading.cached(pickle.loads(piece))
        except (DataError, ConfigError) as error:
            found = [(None, index_of(stop_table(error)))]
        yield pa.table({"found": [pickle.dumps(found)]})


def _read_table(batch: pa.Table, *, name: str, reading: Reading, columns: Columns) -> Iterator[pa.Table]:
    rows = (
        SourceRow(0, number, row_name(name, number), content)
        for part in batch.to_batches(max_chunksize=ROWS_PER_CHUNK)
        for content in part.to_pylist()
        for number in (content.pop(_ROW_NUMBER),)
    )
    yield from reading.rows(renamed(rows, columns))


def _indexed(tables: Any, *, cached: bool) -> Iterator[tuple[Any, BlockIndex]]:
    """Each block with its index, as the blocks are finished: a reference, or where it is in the cache."""
    import ray

    if cached:
        for bundle in tables.iter_internal_ref_bundles():
            for table in ray.get(bundle.block_refs):
                for found in table.column("found").to_pylist() if len(table) else []:
                    yield from pickle.loads(found)
        return
    # One CPU a task, though it is short: a task of none would start a process for each block at once.
    # DEFAULT: not within the placement group of a caller that is itself a Tune trial.
    index_remotely = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(index_of)
    waiting: dict[Any, Any] = {}
    for bundle in tables.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            waiting[index_remotely.remote(block)] = block
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
        for ready in done:
            yield waiting.pop(ready), ray.get(ready)
    for ready, block in waiting.items():
        yield block, ray.get(ready)


def _numbered(dataset: Any, max_rows: int | None) -> Any:
    """The dataset's blocks in its own order, each row with its number in a column."""
    import ray

    @ray.remote(scheduling_strategy="DEFAULT")  # type: ignore[untyped-decorator]
    def count(table: pa.Table) -> int:
        return len(table)

    @ray.remote(scheduling_strategy="DEFAULT")  # type: ignore[untyped-decorator]
    def number(table: pa.Table, start: int) -> pa.Table:
        return table.append_column(_ROW_NUMBER, pa.array(range(start, start + len(table)), pa.int64()))

    options = dataset.context.execution_options
    kept_order, options.preserve_order = options.preserve_order, True
    try:
        refs = (dataset if max_rows is None else dataset.limit(max_rows)).to_arrow_refs()
    finally:
        options.preserve_order = kept_order
    counts: list[int] = ray.get([count.remote(ref) for ref in refs])
    starts = np.cumsum([0, *counts]).tolist()
    if starts[-1] == 0:
        raise DataError("the ray.data.Dataset has no rows; give a dataset that has some")
    return ray.data.from_arrow_refs(
        [number.remote(ref, start) for ref, start, rows in zip(refs, starts, counts, strict=False) if rows]
    )


def check_one_form(names: list[str], indices: list[BlockIndex]) -> None:
    """Raises `DataError` where rows are of several text forms, with the first row of each."""
    first: dict[str, tuple[int, int]] = {}
    for index in indices:
        for form, place in index.forms.items():
            first[form] = min(place, first.get(form, place))
    if len(first) > 1:
        said = "; ".join(f"{row_name(names[place[0]], place[1])} is {form}" for form, place in first.items())
        raise DataError(
            f"the source mixes text forms ({said}); a model learns one form; convert the rows to one form, "
            "or train on one part"
        )


@contextmanager
def quiet_context(block_bytes: int = _BLOCK_BYTES) -> Iterator[Any]:
    """Ray Data without its progress bars and plans, and with small blocks, for the datasets made inside."""
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "Progress bars disabled"
    context = DataContext.get_current()
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": block_bytes,
    }
    before = {option: getattr(context, option) for option in ours}
    for option, value in ours.items():
        setattr(context, option, value)
    try:
        yield context
    finally:
        for option, value in before.items():
            setattr(context, option, value)


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A function to call with each number of rows done; one line on stderr, rewritten on a terminal."""
    live, done = sys.stderr.isatty(), 0

    def show(num_rows: int) -> None:
        nonlocal done
        done += num_rows
        if live:
            print(f"\rtokenizing {name}: {done:,} rows", end="", file=sys.stderr, flush=True)

    yield show
    print(f"{chr(13) if live else ''}tokenizing {name}: {done:,} rows", file=sys.stderr, flush=True)
