"""One piece of a file -> its rows: lines of JSON (plain, gzip, zstd), parquet, arrow (file or stream).

A damaged line is a `SourceRow` that holds a `RowError`; a damaged file is a `DataError`.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import PurePath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm.data.pieces import ARROW_SUFFIXES, PARQUET_SUFFIXES, Shard, SourceRow, kind_of, row_name
from rayrm.data.remote import open_remote, readable_errors
from rayrm.errors import DataError, RowError

LINES_PER_BLOCK = 256
ROWS_PER_CHUNK = 1000
_BUFFER_BYTES = 2**18
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_END_OF_STREAM = b"\xff\xff\xff\xff" + bytes(4)
_BOM = b"\xef\xbb\xbf"


def read_shard(shard: Shard) -> Iterator[SourceRow]:
    """The rows of a piece of a file, in order. Raises `DataError` where it stops being readable."""
    with file_errors(shard):
        _check_unchanged(shard)
        kind = kind_of(shard.path)
        if kind.endswith(PARQUET_SUFFIXES):
            yield from _read_parquet(shard)
        elif kind.endswith(ARROW_SUFFIXES):
            yield from _read_arrow(shard)
        else:
            yield from _read_lines(shard)


@contextmanager
def file_errors(shard: Shard) -> Iterator[None]:
    """What goes wrong inside with the file, as a `DataError` that names it and what to do."""
    if shard.remote is not None:
        with readable_errors(shard.remote.url), _named(shard.path):
            yield
        return
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        test = {".gz": " (check: gzip -t)", ".zst": " (check: zstd -t)"}.get(PurePath(shard.path).suffix, "")
        raise DataError(
            f"{shard.path} cannot be read ({type(error).__name__}: {error}); it is damaged, cut short or not "
            f"what its name says; copy it again{test}"
        ) from error


@contextmanager
def open_text(shard: Shard) -> Iterator[BinaryIO]:
    """A text file's bytes from its beginning, decompressed. A file that holds one JSON array is refused."""
    with open_raw(shard) as raw, closing(raw):
        codec = codec_of(shard.path, raw)
        stream = raw
        if codec is not None:
            if not raw.peek(1):
                raise EOFError(f"the file is empty, and no {codec} stream is")
            stream = io.BufferedReader(cast(Any, pa.CompressedInputStream(raw, codec)), _BUFFER_BYTES)
        _refuse_json_array(shard.path, stream.peek(64)[:64])
        yield cast(BinaryIO, stream)


def codec_of(path: str, raw: io.BufferedReader) -> str | None:
    """How a file is compressed, by its name, or where that says nothing, by its first bytes."""
    return _CODECS.get(PurePath(kind_of(path)).suffix) or _MAGIC.get(raw.peek(2)[:2])


def open_raw(shard: Shard) -> Any:
    """The file's bytes as they are, buffered; to be used in a `with`."""
    if shard.remote is None:
        return open(shard.path, "rb", buffering=_BUFFER_BYTES)
    return io.BufferedReader(cast(Any, open_remote(shard.remote, seek=False)), _BUFFER_BYTES)


def open_seekable(shard: Shard) -> Any:
    """The file for readers that jump in it."""
    return pa.memory_map(shard.path) if shard.remote is None else open_remote(shard.remote, seek=True)


def arrow_batches(file: Any) -> tuple[int | None, Any]:
    """The number of record batches, where the format tells it, and what gives the next or the i-th.

    The file format (`ARROW1` at its beginning) has an index of them; the stream format, in which `datasets`
    saves, is read from its beginning, which moves no data where the file is memory-mapped.
    """
    magic = file.read(6)
    file.seek(0)
    if not magic:
        raise EOFError("the file is empty")
    if magic != b"ARROW1":
        _check_ending(file)
    if magic == b"ARROW1":
        indexed = pa.ipc.open_file(file)
        return indexed.num_record_batches, indexed.get_batch
    stream = pa.ipc.open_stream(file)
    return None, lambda _: stream.read_next_batch()


def _check_ending(file: Any) -> None:
    """A stream cut between two batches reads as whole, but for the mark that should end it."""
    size = file.seek(0, os.SEEK_END)
    size = file.tell() if size is None else size
    file.seek(max(0, size - len(_END_OF_STREAM)))
    ending = file.read(len(_END_OF_STREAM))
    file.seek(0)
    if ending != _END_OF_STREAM:
        raise EOFError("the Arrow stream does not end where the file does")


@contextmanager
def _named(path: str) -> Iterator[None]:
    """pyarrow's errors tell no file: of several behind one URL it is the name that counts."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        if path in str(error):
            raise
        raise OSError(f"{path}: {error}") from error


def _check_unchanged(shard: Shard) -> None:
    if shard.remote is None and shard.size is not None:
        size = os.stat(shard.path).st_size
        if size != shard.size:
            raise DataError(
                f"{shard.path} ({size:,} bytes) had {shard.size:,} when it was planned; start again, and "
                "leave files as they are while they are read"
            )


def _refuse_json_array(path: str, start: bytes) -> None:
    if start.removeprefix(_BOM).lstrip().startswith(b"["):
        raise DataError(
            f"{path} begins with '[': it holds a JSON array; rows are one JSON object a line; convert one "
            f"array of objects with: jq -c '.[]' {PurePath(path).name}"
        )


def _read_lines(shard: Shard) -> Iterator[SourceRow]:
    if shard.start:
        opened: Any = open_raw(shard)
    else:
        opened = open_text(shard)
    with opened as stream:
        if shard.start:
            stream.seek(shard.start)
        remaining = sys.maxsize if shard.length is None else shard.length
        stop = None if shard.stop is None else max(0, shard.stop - shard.first_row)
        for number, line in enumerate(islice(stream, stop), shard.first_row):
            if remaining <= 0:
                return
            remaining -= len(line)
            if number // LINES_PER_BLOCK % shard.num_parts != shard.part:
                continue
            if number == 0:
                line = line.removeprefix(_BOM)
            if line and not line.isspace():
                yield SourceRow(shard.source, number, row_name(shard.path, number), _parse_line(line), line)


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
    with closing(open_seekable(shard)) as opened, pq.ParquetFile(opened) as file:
        end = file.metadata.num_row_groups if shard.length is None else shard.start + shard.length
        groups = range(shard.start, end)
        yield from _rows_of(shard, file.iter_batches(batch_size=ROWS_PER_CHUNK, row_groups=groups))


def _read_arrow(shard: Shard) -> Iterator[SourceRow]:
    # An HTTP server that serves no ranges still serves the whole: `open_remote` sees to it.
    with closing(open_seekable(shard)) as opened:
        yield from _rows_of(shard, _batches(shard, opened))


def _batches(shard: Shard, file: Any) -> Iterator[Any]:
    num_batches, batch_at = arrow_batches(file)
    last = None if shard.length is None else shard.start + shard.length
    if num_batches is not None:
        last = num_batches if last is None else min(last, num_batches)
    place = shard.start if num_batches is not None else 0
    while last is None or place < last:
        try:
            batch = batch_at(place)
        except StopIteration:
            return
        if place >= shard.start:
            yield batch
        place += 1


def _rows_of(shard: Shard, batches: Iterator[Any]) -> Iterator[SourceRow]:
    number, stop = shard.first_row, sys.maxsize if shard.stop is None else shard.stop
    for batch in batches:
        texts = [field.name for field in batch.schema if _is_json(field.type)]
        for start in range(0, len(batch), ROWS_PER_CHUNK):
            if number >= stop:
                return
            for content in batch.slice(start, min(ROWS_PER_CHUNK, stop - number)).to_pylist():
                row = _with_json(content, texts) if texts else content
                yield SourceRow(shard.source, number, row_name(shard.path, number), row)
                number += 1


def _is_json(kind: Any) -> bool:
    """Whether a column holds JSON texts, as `datasets.Json` stores what has no one type."""
    return getattr(kind, "extension_name", None) == "arrow.json"


def _with_json(content: dict[str, Any], columns: list[str]) -> dict[str, Any] | RowError:
    try:
        return content | {name: json.loads(content[name]) for name in columns if content[name] is not None}
    except (ValueError, RecursionError) as error:
        return RowError(
            "bad-json", f"a column of JSON ({', '.join(columns)}) holds none: {error}; correct it"
        )
