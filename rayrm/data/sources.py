"""What a run names as data -> a plan: the pieces to read, and to which of the named sources each belongs.

A source is a file, directory, glob, URL or hub name, a `datasets` dataset, a list of rows, a `SourceConfig`
around a path, or a list of these. Each thing named is one *group*, whose rows are counted, capped and weighed
together; each of its files is one *source index*. No ray, no tokenizer. The reading is in `files` and `hub`.
"""

from __future__ import annotations

import glob
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rayrm.data.columns import check_columns, renamed
from rayrm.data.cuts import cut
from rayrm.data.files import ROWS_PER_CHUNK, read_shard
from rayrm.data.hub import (
    dataset_parts,
    hub_stream,
    is_dataset,
    is_stream,
    load_hub_dataset,
    read_part,
    read_stream,
    saved_files,
    stream_shards,
    stream_start,
)
from rayrm.data.pieces import (
    SUFFIXES,
    Columns,
    DatasetPart,
    Piece,
    RowChunk,
    Shard,
    SourceRow,
    StreamShard,
    place_of,
    row_name,
)
from rayrm.data.remote import find_remote
from rayrm.data_settings import SourceConfig
from rayrm.errors import DataError
from rayrm.urls import is_url, masked

__all__ = [
    "ROWS_PER_CHUNK",
    "DatasetPart",
    "RowChunk",
    "Shard",
    "SourceGroup",
    "SourcePlan",
    "SourceRow",
    "StreamShard",
    "check_found",
    "hub_stream",
    "load_hub_dataset",
    "place_of",
    "plan_sources",
    "read_work",
    "row_name",
]

MANY_FILES = 64
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w[\w.-]*)?")


@dataclass(frozen=True, slots=True)
class SourceGroup:
    """One thing that was named as data: what reports call it, its weight, and its columns' names."""

    name: str
    weight: float = 1.0
    columns: Columns = ()


@dataclass(slots=True)
class SourcePlan:
    """The sources' names, by index, the group of each, and the pieces to read, in the data's order."""

    names: list[str] = field(default_factory=list)
    work: list[Piece] = field(default_factory=list)
    groups: list[SourceGroup] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)

    @property
    def group_names(self) -> list[str]:
        """What reports call each source, by index."""
        return [self.groups[group].name for group in self.group_of]

    @property
    def weights(self) -> list[float]:
        """How often an epoch shows the rows of each source, by index."""
        return [self.groups[group].weight for group in self.group_of]

    def add_source(self, name: str) -> int:
        self.names.append(name)
        self.group_of.append(len(self.groups) - 1)
        return len(self.names) - 1


@dataclass(frozen=True, slots=True)
class _Named:
    """One group before its files are looked for: paths, or one thing that has rows."""

    group: SourceGroup
    content: Any
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class _How:
    """How a group is planned; `counted`: the groups after it need its number of rows."""

    contiguous: bool
    streaming: bool
    counted: bool


def plan_sources(
    source: Any,
    *,
    max_rows: int | None,
    name: str,
    columns: Mapping[str, Any] | None = None,
    contiguous: bool = False,
    streaming: bool = False,
) -> SourcePlan:
    """What to read for a source, or for several; the same on every machine.

    Only the first `max_rows` rows, in the data's order, are planned. `columns`: those of all sources, beside
    which a `SourceConfig` may name its own. `contiguous`: pieces hold consecutive rows, compressed files too.
    `streaming`: rows that lie in files are read when they are needed, whatever names them. A stream of
    `datasets` that other sources follow is counted, if `max_rows` or `max_pairs` is for all of them.
    Raises `DataError` for a source that is missing, of no known kind, or unreadable at its first byte, and
    `ConfigError` for columns of fields that are none.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"`max_rows` ({max_rows}) must be at least 1; leave it out for all rows of {name}")
    plan, remaining = SourcePlan(), max_rows
    check_columns(columns)
    every = list(_named(source, name, dict(columns or {})))
    for number, named in enumerate(every, 1):
        if remaining == 0:
            break
        taken = {group.name for group in plan.groups}
        own, again = named.group.name, 2
        while own in taken:
            own, again = f"{named.group.name} ({again})", again + 1
        plan.groups.append(replace(named.group, name=own))
        caps = [cap for cap in (remaining, named.max_rows) if cap is not None]
        how = _How(contiguous, streaming, counted=max_rows is not None and number < len(every))
        num_rows = _plan_group(plan, named, min(caps, default=None), how)
        remaining = None if remaining is None else remaining - num_rows
    return plan


def check_found(source: Any) -> None:
    """Raise `DataError` where a path, glob or URL among a source finds no file; reads no row.

    What is none of these (a hub name, a dataset, rows in memory) is left to the reading.
    """
    paths = source.path if isinstance(source, SourceConfig) else source
    if isinstance(paths, (list, tuple)):
        for path in paths:
            check_found(path)
    elif isinstance(paths, (str, os.PathLike)):
        list(_expand_path(os.fspath(paths)))


def read_work(work: Piece) -> Iterator[SourceRow]:
    """The rows of one piece, in order. Raises `DataError` where a file stops being readable."""
    if isinstance(work, RowChunk):
        rows = _read_chunk(work)
    elif isinstance(work, StreamShard):
        rows = read_stream(work)
    elif isinstance(work, DatasetPart):
        rows = read_part(work)
    else:
        rows = read_shard(work)
    yield from renamed(rows, work.columns)


def _read_chunk(chunk: RowChunk) -> Iterator[SourceRow]:
    for number, content in enumerate(pickle.loads(chunk.pickled), chunk.start):
        yield SourceRow(chunk.source, number, row_name(chunk.name, number), content)


def _named(source: Any, name: str, columns: dict[str, Any]) -> Iterator[_Named]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        yield _Named(SourceGroup(masked(path), columns=check_columns(columns)), [path])
    elif isinstance(source, SourceConfig):
        paths = source.path if isinstance(source.path, list) else [source.path]
        shown = source.name or ", ".join(map(masked, paths[:3])) + (" ..." if paths[3:] else "")
        own = check_columns({**columns, **(source.columns or {})})
        yield _Named(SourceGroup(shown, source.weight, own), paths, source.max_pairs)
    elif is_dataset(source) or (
        isinstance(source, Sequence) and any(isinstance(entry, Mapping) for entry in source)
    ):
        yield _Named(SourceGroup(name, columns=check_columns(columns)), source)
    elif isinstance(source, Sequence):
        if not source:
            raise DataError(f"{name} ([]) is empty; give at least one row or source")
        for entry in source:
            yield from _named(entry, name, columns)
    elif isinstance(source, Mapping):
        raise DataError(
            f"{name} is a {type(source).__name__} with {', '.join(map(str, source))}; one source is needed "
            f"here; pick one, such as source[{next(iter(source), 'train')!r}]"
        )
    else:
        raise DataError(
            f"{name} ({type(source).__name__}) is no source of pairs; give a path, glob, directory, URL or "
            "hub name, a datasets.Dataset, a ray.data.Dataset, or a list of rows"
        )


def _plan_group(plan: SourcePlan, named: _Named, limit: int | None, how: _How) -> int:
    """Adds the group's sources and pieces; the number of rows that they hold of `limit` (0 without one)."""
    columns, planned = named.group.columns, 0
    if is_dataset(named.content) or not isinstance(named.content[0], str):
        return _plan_rows(plan, plan.groups[-1].name, named.content, columns, limit, how)
    entries = [entry for path in named.content for entry in _expand_path(path)]
    whole = sum(isinstance(entry, Shard) for entry in entries) >= MANY_FILES
    for number, entry in enumerate(entries, 1):
        left = None if limit is None else limit - planned
        if left == 0:
            break
        if isinstance(entry, Shard):
            shard = replace(entry, source=plan.add_source(entry.path), columns=columns)
            shards, num_rows = cut(shard, left, whole=whole, contiguous=how.contiguous)
            plan.work.extend(shards)
        else:
            rows = hub_stream(entry) if how.streaming else load_hub_dataset(entry)
            then = replace(how, counted=how.counted or number < len(entries))
            num_rows = _plan_rows(plan, entry, rows, columns, left, then)
        planned += num_rows
    return planned


def _plan_rows(plan: SourcePlan, name: str, rows: Any, columns: Columns, limit: int | None, how: _How) -> int:
    """Adds a source that is no file; as `_plan_group`, but 0 also where the number is not to be `counted`."""
    if is_stream(rows) and limit is None:
        shards = stream_shards(len(plan.names), name, rows, columns)
        plan.work.extend(shards)
        for shard in shards:
            plan.add_source(shard.name)
        return 0
    index = plan.add_source(name)
    if is_stream(rows) and how.streaming:
        assert limit is not None
        first = stream_start(index, name, rows, columns, limit)
        plan.work.append(first)
        return sum(1 for _ in read_stream(first)) if how.counted else 0
    parts = dataset_parts(index, name, rows, columns, limit) if how.streaming and is_dataset(rows) else None
    if parts is not None:
        plan.work.extend(parts)
        return sum(part.num_rows for part in parts)
    start = 0
    reader: Iterable[Any] = islice(iter(rows), limit)
    while chunk := list(islice(reader, ROWS_PER_CHUNK)):
        plan.work.append(RowChunk(index, name, start, pickle.dumps(chunk), columns))
        start += len(chunk)
    return start


def _expand_path(text: str) -> Iterator[Shard | str]:
    """The files that a path, directory, glob or URL names, or the hub name that it is."""
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if is_url(text):
        for found in find_remote(text):
            yield Shard(0, found.name, found.size, found.mtime_ns, remote=found.remote)
        return
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.is_dir():
        yield from map(_local, _files_in(path))
    elif path.exists():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is of no known kind; rename or convert it to {', '.join(SUFFIXES)}")
        yield _local(path)
    elif glob.has_magic(text):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"no file matches {text!r} (from {os.getcwd()}); correct the pattern")
        for match in matches:
            yield from _expand_path(match)
    elif _HUB_NAME.fullmatch(text) and not text.endswith(SUFFIXES):
        yield text
    else:
        raise DataError(f"{text} does not exist (looked for {path}); correct the path")


def _local(path: Path) -> Shard:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error}); correct the path, or copy the file again"
        ) from error
    return Shard(0, str(path), stat.st_size, stat.st_mtime_ns)


def _files_in(directory: Path) -> list[Path]:
    saved = saved_files(directory)
    if saved is not None:
        return saved
    found = [
        entry
        for entry in sorted(directory.rglob("*"))
        if entry.name.endswith(SUFFIXES) and entry.is_file()
        if not any(part.startswith((".", "_")) for part in entry.relative_to(directory).parts)
    ]
    if not found:
        raise DataError(
            f"{directory} holds no data file; a directory of pairs has files ending in {', '.join(SUFFIXES)}"
        )
    return found
