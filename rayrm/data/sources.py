"""What a run names as data -> pieces of work that can be read independently, and the reading of one piece.

A file too large for one task is cut into parts: every part reads the whole text file (decompression is cheap
beside tokenization) and keeps every n-th block of 256 lines, or every n-th row group of a parquet file. Each
row keeps its place (index of its source, row number in it), so the data's own order survives any cut.
No ray, no tokenizer. A damaged file is a `DataError`; a damaged line is a `SourceRow` holding a `RowError`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import pickle
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm.errors import DataError, RowError

LINES_PER_BLOCK = 256
ROWS_PER_CHUNK = 1000
BYTES_PER_PART = 2**20
_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w[\w.-]*)?")
_READ_FAILURES = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `part` of `num_parts` of a file; lines (rows of parquet) from `stop` on are not read."""

    source: int
    path: str
    part: int = 0
    num_parts: int = 1
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows of a source that is no file, pickled; the first is row `start` of the source."""

    source: int
    name: str
    start: int
    pickled: bytes


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row at its place: its content or why it cannot be read; `where` is what a message calls it."""

    source: int
    number: int
    where: str
    content: Any | RowError
    line: bytes | None = None


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """The sources' names, by index, and the work of reading them.

    `groups`: what the run named, for each index; all files of a glob or directory are one group.
    """

    names: list[str]
    work: list[Shard | RowChunk]
    groups: list[str]


def plan_sources(source: Any, *, max_parts: int, max_rows: int | None, name: str) -> SourcePlan:
    """What to read for a path, glob, directory, hub name, `datasets` dataset, list of rows, or list of these.

    Only the first `max_rows` rows, in the data's order, are planned. Raises `DataError` for a source that is
    missing, of no known kind, or unreadable at its first byte.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"`max_rows` ({max_rows}) must be at least 1; leave it out for all rows of {name}")
    plan = SourcePlan([], [], [])
    remaining = max_rows
    for group, entry in _expand_named(source, name):
        if remaining == 0:
            break
        plan.groups.append(group)
        index = len(plan.names)
        if isinstance(entry, Path):
            plan.names.append(str(entry))
            shards, num_rows = _plan_file(index, entry, max_parts, remaining)
            plan.work.extend(shards)
        else:
            plan.names.append(entry[0])
            num_rows = 0
            for chunk in _chunks(index, *entry, limit=remaining):
                plan.work.append(chunk[0])
                num_rows += chunk[1]
        remaining = None if remaining is None else remaining - num_rows
    return plan


def read_work(work: Shard | RowChunk) -> Iterator[SourceRow]:
    """The rows of one piece of work, in order. Raises `DataError` where a file stops being readable."""
    if isinstance(work, RowChunk):
        for number, content in enumerate(pickle.loads(work.pickled), work.start):
            yield SourceRow(work.source, number, row_name(work.name, number), content)
        return
    try:
        yield from _read_parquet(work) if work.path.endswith(".parquet") else _read_lines(work)
    except _READ_FAILURES as error:
        raise _unreadable(work.path, error) from error


def row_name(source: str, number: int) -> str:
    """What messages call a row (counted from 0) of a source; of a text file, its line, counted from 1."""
    return f"{source}:{number + 1}" if source.endswith(_TEXT_SUFFIXES) else f"{source}[{number}]"


def place_of(name: str) -> tuple[str, int]:
    """The source and the row's number (from 0) behind a `row_name`."""
    if name.endswith("]"):
        source, _, number = name[:-1].rpartition("[")
        return source, int(number)
    source, _, line = name.rpartition(":")
    return source, int(line) - 1


def _expand_named(source: Any, name: str) -> Iterator[tuple[str, Path | tuple[str, Iterable[Any]]]]:
    """Each expanded entry with what the run named it by: the path as given, else `name`."""
    is_list = isinstance(source, Sequence) and not isinstance(source, str)
    if is_list and source and not any(isinstance(entry, Mapping) for entry in source):
        for entry in source:
            yield from _expand_named(entry, name)
        return
    group = os.fspath(source) if isinstance(source, (str, os.PathLike)) else name
    for entry in _expand(source, name):
        yield group, entry


def _expand(source: Any, name: str) -> Iterator[Path | tuple[str, Iterable[Any]]]:
    if isinstance(source, (str, os.PathLike)):
        yield from _expand_path(os.fspath(source))
    elif (datasets := sys.modules.get("datasets")) and isinstance(
        source, (datasets.Dataset, datasets.IterableDataset)
    ):
        yield name, source
    elif isinstance(source, Sequence):
        if not source:
            raise DataError(f"{name} ([]) is empty; give at least one row or source")
        if any(isinstance(entry, Mapping) for entry in source):
            yield name, source
        else:
            for entry in source:
                yield from _expand(entry, name)
    elif isinstance(source, Mapping):
        raise DataError(
            f"{name} is a {type(source).__name__} with {', '.join(map(str, source))}; one source is needed "
            f"here; pick one, such as source[{next(iter(source), 'train')!r}]"
        )
    else:
        raise DataError(
            f"{name} ({type(source).__name__}) is no source of pairs; give a path, glob, directory or hub "
            "name, a datasets.Dataset, a ray.data.Dataset, or a list of rows"
        )


def _expand_path(text: str) -> Iterator[Path | tuple[str, Iterable[Any]]]:
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.is_dir():
        found = [
            entry
            for entry in sorted(path.rglob("*"))
            if entry.name.endswith(_SUFFIXES) and entry.is_file()
            if not any(part.startswith((".", "_")) for part in entry.relative_to(path).parts)
        ]
        if not found:
            raise DataError(
                f"{path} holds no data file; a directory of pairs has files ending in {', '.join(_SUFFIXES)}"
            )
        yield from found
    elif path.exists():
        if not path.name.endswith(_SUFFIXES):
            raise DataError(f"{path} is of no known kind; rename or convert it to {', '.join(_SUFFIXES)}")
        yield path
    elif glob.has_magic(text):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"no file matches {text!r} (from {os.getcwd()}); correct the pattern")
        for match in matches:
            yield from _expand_path(match)
    elif _HUB_NAME.fullmatch(text) and not text.endswith(_SUFFIXES):
        yield text, load_hub_dataset(text)
    else:
        hint = " (remote paths: pass ray.data.read_json(...) or mount them)" if "://" in text else ""
        raise DataError(f"{text} does not exist (looked for {path}){hint}; correct the path")


def load_hub_dataset(name: str) -> Any:
    """The rows of `org/name` or `org/name:split` (default split: `train`), by `datasets.load_dataset`."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # not found, offline, refused; bad split; script sets
        raise DataError(
            f"{name} is no path here and the hub gives no such dataset ({type(error).__name__}: {error}); "
            "correct the path, or the name and split (org/name:split); offline, give a local file"
        ) from error


def _chunks(
    source: int, name: str, rows: Iterable[Any], *, limit: int | None
) -> Iterator[tuple[RowChunk, int]]:
    reader, start = islice(iter(rows), limit), 0
    while chunk := list(islice(reader, ROWS_PER_CHUNK)):
        yield RowChunk(source, name, start, pickle.dumps(chunk)), len(chunk)
        start += len(chunk)


def _plan_file(source: int, path: Path, max_parts: int, limit: int | None) -> tuple[list[Shard], int]:
    stop: int | None = None
    num_rows = 0
    try:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            metadata = pq.read_metadata(path)
            cuts = metadata.num_row_groups
            if limit is not None:
                stop = num_rows = min(limit, metadata.num_rows)
        else:
            _refuse_json_array(path)
            size *= 4 if _is_gzip(path) else 1
            cuts = max_parts
            if limit is not None:
                stop, num_rows = _lines_holding(path, limit)
                cuts = -(-stop // (4 * LINES_PER_BLOCK))
    except _READ_FAILURES as error:
        raise _unreadable(str(path), error) from error
    num_parts = max(1, min(max_parts, cuts, -(-size // BYTES_PER_PART)))
    return [Shard(source, str(path), part, num_parts, stop) for part in range(num_parts)], num_rows


def _refuse_json_array(path: Path) -> None:
    with _open(path) as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise DataError(
            f"{path} begins with '[': it is one JSON array; rows are one JSON object a line; "
            f"convert it with: jq -c '.[]' {path.name}"
        )


def _lines_holding(path: Path, num_rows: int) -> tuple[int, int]:
    """How many lines hold the first `num_rows` rows (blank lines are none), and how many rows those are."""
    found = stop = 0
    with _open(path) as stream:
        for line in stream:
            if found == num_rows:
                break
            stop += 1
            found += not line.isspace()
    return stop, found


def _read_lines(shard: Shard) -> Iterator[SourceRow]:
    with _open(Path(shard.path)) as stream:
        for number, line in enumerate(islice(stream, shard.stop)):
            if number // LINES_PER_BLOCK % shard.num_parts != shard.part:
                continue
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                content = _parse_line(line)
                yield SourceRow(shard.source, number, row_name(shard.path, number), content, line)


def _parse_line(line: bytes) -> Any | RowError:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(
            "not-utf8",
            f"byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8; convert the file "
            "with: iconv -f <its encoding> -t utf-8",
        )
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", "replace").rstrip("\n")
        return RowError(
            "bad-json", f"the line ({shown!r}) is not JSON: {error}; correct it, one object a line"
        )


def _read_parquet(shard: Shard) -> Iterator[SourceRow]:
    stop = sys.maxsize if shard.stop is None else shard.stop
    with pq.ParquetFile(shard.path) as file:
        start = 0
        for group in range(file.metadata.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            if group % shard.num_parts == shard.part and start < stop:
                number = start
                for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, row_groups=[group]):
                    for content in batch.to_pylist():
                        if number >= stop:
                            return
                        yield SourceRow(shard.source, number, row_name(shard.path, number), content)
                        number += 1
            start += length


def _is_gzip(path: Path) -> bool:
    if path.suffix == ".gz":
        return True
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    if _is_gzip(path):
        return cast(BinaryIO, gzip.GzipFile(path))
    return path.open("rb")


def _unreadable(path: str, error: BaseException) -> DataError:
    return DataError(
        f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged, cut short or not what its "
        "name says; copy it again" + (" (check: gzip -t)" if path.endswith(".gz") else "")
    )
