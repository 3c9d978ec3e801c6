"""The pieces that sources are cut into, each readable in any process, and the rows that come out of one.

A row keeps its place (index of its source, number in it) whatever the cut, so the data has one order.
Pieces are the same on every machine: they depend on the data alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayrm.errors import RowError

TEXT_SUFFIXES = tuple(
    f"{kind}{codec}" for codec in ("", ".gz", ".zst") for kind in (".jsonl", ".json", ".ndjson")
)
PARQUET_SUFFIXES = (".parquet",)
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (*TEXT_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES)

Columns = tuple[tuple[str, str], ...]
"""(our field, the column that holds it), for sources whose columns have other names."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file behind a URL: the URL that was typed, the file's path in that filesystem, and how to reach it.

    `url` may hold credentials, and `settings` are the environment's: neither is shown.
    """

    url: str = field(repr=False)
    path: str
    settings: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Shard:
    """Part of a file, or all of it; `path` is what messages call it, without credentials.

    `start` and `length` count bytes of plain text, row groups of parquet, record batches of arrow;
    `length` None: to the end. `first_row` is the row number at `start`. A compressed text is read whole by
    each of `num_parts`, which keeps every n-th block of lines. Rows from `stop` on are not read.
    """

    source: int
    path: str
    size: int | None = None
    mtime_ns: int | None = None
    start: int = 0
    length: int | None = None
    first_row: int = 0
    part: int = 0
    num_parts: int = 1
    stop: int | None = None
    columns: Columns = ()
    remote: Remote | None = None


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows of a source that is no file, pickled; the first is row `start` of the source."""

    source: int
    name: str
    start: int
    pickled: bytes
    columns: Columns = ()


@dataclass(frozen=True, slots=True)
class StreamShard:
    """One of a `datasets.IterableDataset`'s own shards, or its first `stop` rows, pickled.

    Its rows are counted from 0.
    """

    source: int
    name: str
    pickled: bytes
    columns: Columns = ()
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """Consecutive rows of a `datasets.Dataset` that lies on disk, from row `start` of the source on.

    `pickled` is the dataset with these rows alone: it names files, which every process that reads must see.
    `num_bytes` are those of its Arrow data.
    """

    source: int
    name: str
    start: int
    num_rows: int
    num_bytes: int
    pickled: bytes
    columns: Columns = ()


Piece = Shard | RowChunk | StreamShard | DatasetPart


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row at its place: its content or why it cannot be read; `where` is what a message calls it."""

    source: int
    number: int
    where: str
    content: Any | RowError
    line: bytes | None = None


def kind_of(path: str) -> str:
    """A path without the query of its URL: its ending tells what the file is."""
    return path.partition("?")[0] if "://" in path else path


def row_name(source: str, number: int) -> str:
    """What messages call a row (counted from 0) of a source; of a text file, its line, counted from 1."""
    return f"{source}:{number + 1}" if kind_of(source).endswith(TEXT_SUFFIXES) else f"{source}[{number}]"


def place_of(name: str) -> tuple[str, int]:
    """The source and the row's number (from 0) behind a `row_name`."""
    if name.endswith("]"):
        source, _, number = name[:-1].rpartition("[")
        return source, int(number)
    source, _, line = name.rpartition(":")
    return source, int(line) - 1
