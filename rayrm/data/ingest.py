"""[RAY] A source of preference rows -> a `TokenizedSet`, read and tokenized in parallel by Ray Data.

The tokenized blocks stay in Ray's object store; the driver keeps an index of about 110 bytes a pair. Rows
stand in the data's own order whatever the number of tasks. Every row is counted: accepted, or refused with a
reason and written to the quarantine file. A bad source raises `DataError` here, before any worker starts.
Cost: the ids, 4 bytes a token with the shared prefix once, in the object store (which spills to disk).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import pickle
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrm.data.blocks import SCHEMA, BlockIndex, RowBlock, index_of, table_of_rows, tokenized_tables
from rayrm.data.preference import PairForm
from rayrm.data.quarantine import check_refusals, one_line, write_quarantine
from rayrm.data.row_index import Counts, RowIndex
from rayrm.data.sources import ROWS_PER_CHUNK, SourceRow, plan_sources, read_work, row_name
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import ConfigError, DataError
from rayrm.own_ray import ensure_ray

_log = logging.getLogger("rayrm.data")
_BLOCK_BYTES = (
    4 * 2**20
)  # small enough that fetching random rows moves little, large enough that refs are few
_OPEN_BLOCKS = 32
_STOP = {"data": DataError, "config": ConfigError}
_ROW_NUMBER = "__rayrm_row__"


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What became of a source's rows.

    Of `num_rows` read, `num_accepted` are in the set, with `num_completions` completions; a pair has two.
    `num_tokens` counts every completion whole; `num_shared_tokens` of them are prefixes counted again.
    `fingerprint` is a hash of the rows in order: the same for the same rows, however they were read.
    """

    name: str
    num_rows: int
    num_accepted: int
    num_completions: int
    refused: dict[str, int]
    text_form: PairForm
    fingerprint: str
    num_tokens: int
    num_shared_tokens: int


@dataclass(slots=True)
class TokenizedSet:
    """Tokenized rows in the data's own order, wherever they lie; pickles small, for Ray Train's workers.

    `index` holds what is known of them without their ids. `fetch` gets the blocks it needs and keeps the last
    few open; the rows it gives are copies.
    """

    index: RowIndex
    report: IngestReport
    _blocks: list[Any]  # ObjectRefs of tables, or tables
    _block_of: Counts
    _offset: Counts
    _open: OrderedDict[int, RowBlock] = field(default_factory=OrderedDict, repr=False)

    @property
    def num_rows(self) -> int:
        return len(self._block_of)

    @classmethod
    def from_rows(cls, rows: Sequence[TokenizedRow], name: str = "rows") -> TokenizedSet:
        """A set of rows in this process's memory; needs and starts no Ray."""
        table = table_of_rows(rows)
        return _assemble(name, [table], [index_of(table)])

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]:
        """The rows at these positions (0 .. num_rows-1), in the order asked."""
        wanted = np.asarray(rows, dtype=np.int64)
        needed = self._block_of[wanted].tolist()
        absent = [block for block in dict.fromkeys(needed) if block not in self._open]
        opened = {block: self._open[block] for block in dict.fromkeys(needed) if block in self._open}
        opened |= zip(absent, map(RowBlock, _resolve([self._blocks[block] for block in absent])), strict=True)
        for block, content in opened.items():
            self._open[block] = content
            self._open.move_to_end(block)
        while len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        offsets = self._offset[wanted].tolist()
        return [opened[block].row(offset) for block, offset in zip(needed, offsets, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedSet, (self.index, self.report, self._blocks, self._block_of, self._offset)


def ingest(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    max_rows: int | None = None,
    quarantine_path: str | Path | None = None,
    max_bad_row_fraction: float = 0.01,
    max_tasks: int | None = None,
    name: str = "train",
) -> TokenizedSet:
    """All acceptable rows of a source, tokenized.

    `source`: a path, glob or directory of jsonl, jsonl.gz, parquet; a hub name; a `datasets.Dataset` or
    `IterableDataset`; a `ray.data.Dataset`; a list of rows; a list of these. `max_rows`: the first rows only.
    `max_tasks`: read and tokenize in so many tasks at once (None: the cluster's CPUs).
    Refused rows are appended to `quarantine_path`; more than `max_bad_row_fraction` of them (a row above
    `max_length` is filtered, not bad) raise `DataError`, as do a missing, unreadable or empty source and one
    that mixes text forms. A missing chat template is a `ConfigError`.
    """
    ensure_ray()
    names, tables = _read(source, ray_pickle(tokenizer), max_length, max_rows, max_tasks, name)
    blocks: list[Any] = []
    indices: list[BlockIndex] = []
    with _progress(name) as show:
        for block, index in _indexed(tables):
            _raise_if_stopped(index)
            blocks.append(block)
            indices.append(index)
            show(index.num_rows)
    refusals = sorted(itertools.chain.from_iterable(index.refusals for index in indices))
    num_rows = sum(index.num_rows for index in indices)
    if quarantine_path is not None:
        write_quarantine(Path(quarantine_path), names, refusals)
    said = name if name in names else f"{name} ({', '.join(names[:3])}{' ...' if names[3:] else ''})"
    check_refusals(said, num_rows, refusals, max_bad_row_fraction, quarantine_path)
    _check_one_form(names, indices)
    tokenized = _assemble(name, blocks, indices)
    _log.info("%s", one_line(name, num_rows, refusals))
    return tokenized


def ray_pickle(tokenizer: Any) -> bytes:
    """A tokenizer as bytes, also where its class lives in the caller's script."""
    from ray import cloudpickle

    return bytes(cloudpickle.dumps(tokenizer))


def _assemble(name: str, blocks: list[Any], indices: list[BlockIndex]) -> TokenizedSet:
    """The set of all blocks' rows, ordered by (source, row)."""

    def joined(field_name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(index, field_name) for index in indices])

    order = np.lexsort((joined("row"), joined("source")))
    rows = RowIndex.joined([index.rows for index in indices]).take(order)
    block_of = np.repeat(np.arange(len(blocks), dtype=np.int32), [len(index.row) for index in indices])
    num_tokens = int(rows.tokens(share=False).sum())
    report = IngestReport(
        name=name,
        num_rows=sum(index.num_rows for index in indices),
        num_accepted=len(order),
        num_completions=len(rows.lengths),
        refused=dict(
            Counter(refusal.reason for index in indices for refusal in index.refusals).most_common()
        ),
        text_form=next((form for index in indices for form in index.forms), "tokenized"),
        fingerprint=hashlib.sha256(joined("digest")[order].tobytes()).hexdigest(),
        num_tokens=num_tokens,
        num_shared_tokens=num_tokens - int(rows.tokens(share=True).sum()),
    )
    return TokenizedSet(rows, report, blocks, block_of[order], joined("offset")[order].astype(np.int32))


def _resolve(blocks: list[Any]) -> list[pa.Table]:
    if not blocks or isinstance(blocks[0], pa.Table):
        return blocks
    import ray

    tables: list[pa.Table] = ray.get(blocks)
    return tables


def _read(
    source: Any,
    tokenizer: bytes,
    max_length: int | None,
    max_rows: int | None,
    max_tasks: int | None,
    name: str,
) -> tuple[list[str], Any]:
    """The sources' names and the (lazy) Ray dataset of their tokenized blocks."""
    import ray

    with _quiet_context():
        if isinstance(source, ray.data.Dataset):
            run = functools.partial(_tokenize_table, name=name, tokenizer=tokenizer, max_length=max_length)
            # A batch size gathers tiny blocks into one task.
            return [name], _numbered(source, max_rows).map_batches(
                run, batch_size=ROWS_PER_CHUNK, batch_format="pyarrow", concurrency=max_tasks
            )
        plan = plan_sources(source, max_rows=max_rows, name=name)
        if not plan.work:
            raise DataError(f"{name} has no rows; give a source that has some")
        items = [{"work": pickle.dumps(piece)} for piece in plan.work]
        run = functools.partial(_tokenize_work, tokenizer=tokenizer, max_length=max_length)
        work = ray.data.from_items(items, override_num_blocks=len(items))
        return plan.names, work.map_batches(
            run, batch_size=None, batch_format="pyarrow", concurrency=max_tasks
        )


def _tokenize_work(batch: pa.Table, *, tokenizer: bytes, max_length: int | None) -> Iterator[pa.Table]:
    for piece in batch.column("work").to_pylist():
        yield from _tables_or_stop(read_work(pickle.loads(piece)), tokenizer, max_length)


def _tokenize_table(
    batch: pa.Table, *, name: str, tokenizer: bytes, max_length: int | None
) -> Iterator[pa.Table]:
    rows = (
        SourceRow(0, number, row_name(name, number), content)
        for part in batch.to_batches(max_chunksize=ROWS_PER_CHUNK)
        for content in part.to_pylist()
        for number in (content.pop(_ROW_NUMBER),)
    )
    yield from _tables_or_stop(rows, tokenizer, max_length)


def _tables_or_stop(
    rows: Iterator[SourceRow], tokenizer: bytes, max_length: int | None
) -> Iterator[pa.Table]:
    """The rows' tables; an error that ends the whole ingest travels as a row, not as a task's stack trace."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    try:
        yield from tokenized_tables(rows, _load_tokenizer(tokenizer), max_length)
    except (DataError, ConfigError) as error:
        kind = "config" if isinstance(error, ConfigError) else "data"
        stop = {"source": 0, "row": 0, "ids": [], "digest": bytes(16), "reason": f"!{kind}"}
        yield pa.Table.from_pylist([{**stop, "message": str(error), "raw": ""}], SCHEMA)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(pickled: bytes) -> Any:
    """Unpickled once a worker process: with a large vocabulary that takes longer than a task's work."""
    return pickle.loads(pickled)


def _raise_if_stopped(index: BlockIndex) -> None:
    for refusal in index.refusals:
        if refusal.reason.startswith("!"):
            raise _STOP[refusal.reason[1:]](refusal.message)


def _indexed(tables: Any) -> Iterator[tuple[Any, BlockIndex]]:
    """Each block's reference with its index, as the blocks are finished."""
    import ray

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


def _check_one_form(names: list[str], indices: list[BlockIndex]) -> None:
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
def _quiet_context() -> Iterator[None]:
    """Ray Data without its progress bars and plans, and with small blocks, for the datasets made inside."""
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "Progress bars disabled"
    context = DataContext.get_current()
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": _BLOCK_BYTES,
    }
    before = {option: getattr(context, option) for option in ours}
    for option, value in ours.items():
        setattr(context, option, value)
    try:
        yield
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
