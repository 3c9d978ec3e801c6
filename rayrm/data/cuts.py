"""Where a file is cut into pieces: by its size and content alone, so that every machine cuts alike.

Plain text: at the first line end of each 4 MiB, found in one scan. Compressed text: interleaved parts, each
of which decompresses all. Parquet: row groups gathered to 4-16 MiB, from the footer. Arrow: record batches
likewise. One piece: remote files (but parquet), and files of a source that has 64 or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq

from rayrm.data.files import (
    LINES_PER_BLOCK,
    arrow_batches,
    codec_of,
    file_errors,
    open_raw,
    open_seekable,
    open_text,
)
from rayrm.data.pieces import ARROW_SUFFIXES, PARQUET_SUFFIXES, Shard, kind_of
from rayrm.data.remote import serves_ranges

BYTES_PER_PIECE = 4 * 2**20
MOST_BYTES_PER_PIECE = 16 * 2**20
BYTES_PER_COMPRESSED_PART = 32 * 2**20
MOST_PARTS = 16
_EXPANSION = 4  # of compressed text, about
_LINE_END = 10


def cut(shard: Shard, limit: int | None, *, whole: bool, contiguous: bool) -> tuple[list[Shard], int]:
    """The pieces of a file that hold its first `limit` rows, and the number of these (0 without a limit).

    `whole`: one piece. `contiguous`: none that is interleaved with others. Raises `DataError` for a file that
    cannot be read at its first byte, unless it need not be opened (`whole`, no limit).
    """
    with file_errors(shard):
        kind = kind_of(shard.path)
        if whole and limit is None:
            return [shard], 0
        if kind.endswith(PARQUET_SUFFIXES):
            return _cut_parquet(shard, limit, whole)
        if kind.endswith(ARROW_SUFFIXES):
            return _cut_arrow(shard, limit, whole)
        return _cut_text(shard, limit, whole, contiguous)


def line_cuts(stream: BinaryIO, num_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, line number) where pieces of about `num_bytes` of a plain text begin, after the first.

    `stream` is a buffered one: it fills what it is given, where a raw one may give less, here or there.
    """
    buffer = bytearray(num_bytes)
    view, codes = memoryview(buffer), np.frombuffer(buffer, np.uint8)
    offset = lines = 0
    while filled := stream.readinto(view):  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if offset:
            first = buffer.find(b"\n", 0, filled)
            if first >= 0:
                yield offset + first + 1, lines + 1
        lines += int(np.count_nonzero(codes[:filled] == _LINE_END))
        offset += filled


def _cut_text(shard: Shard, limit: int | None, whole: bool, contiguous: bool) -> tuple[list[Shard], int]:
    num_rows = 0
    if limit is not None:
        stop, num_rows = _lines_holding(shard, limit)
        shard = replace(shard, stop=stop)
    else:
        with open_text(shard):  # is it readable at its first byte?
            pass
    size = shard.size or 0
    if whole or shard.remote is not None or not size:
        return [shard], num_rows
    with open_raw(shard) as raw:
        codec = codec_of(shard.path, raw)
        if codec is None:
            return _cut_lines(shard, size), num_rows
    parts = 1 if contiguous else min(MOST_PARTS, -(-_EXPANSION * size // BYTES_PER_COMPRESSED_PART))
    if shard.stop is not None:
        parts = min(parts, -(-shard.stop // (4 * LINES_PER_BLOCK)))
    parts = max(1, parts)
    return [replace(shard, part=part, num_parts=parts) for part in range(parts)], num_rows


def _cut_lines(shard: Shard, size: int) -> list[Shard]:
    begins = [(0, 0)]
    if size > BYTES_PER_PIECE:
        with open(shard.path, "rb") as stream:
            for offset, line in line_cuts(stream, BYTES_PER_PIECE):
                if offset >= size or (shard.stop is not None and line >= shard.stop):
                    break
                begins.append((offset, line))
    ends = [offset for offset, _ in begins[1:]] + [size]
    return [
        replace(shard, start=offset, length=end - offset, first_row=line)
        for (offset, line), end in zip(begins, ends, strict=True)
    ]


def _lines_holding(shard: Shard, num_rows: int) -> tuple[int, int]:
    """How many lines hold the first `num_rows` rows (blank lines are none), and how many rows those are."""
    found = stop = 0
    with open_text(shard) as stream:
        for line in stream:
            if found == num_rows:
                break
            stop += 1
            found += not line.isspace()
    return stop, found


def _cut_parquet(shard: Shard, limit: int | None, whole: bool) -> tuple[list[Shard], int]:
    if limit is None and shard.remote is not None and not serves_ranges(shard.remote):
        return [shard], 0  # the footer would cost the whole file
    with closing(open_seekable(shard)) as opened, pq.ParquetFile(opened) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return _gathered(shard, sizes, limit, whole)


def _cut_arrow(shard: Shard, limit: int | None, whole: bool) -> tuple[list[Shard], int]:
    if limit is None and shard.remote is not None:
        return [shard], 0
    sizes: list[tuple[int, int]] = []
    with closing(open_seekable(shard)) as opened:
        num_batches, batch_at = arrow_batches(opened)
        while (num_batches is None or len(sizes) < num_batches) and (
            limit is None or sum(rows for rows, _ in sizes) < limit
        ):
            try:
                batch = batch_at(len(sizes))
            except StopIteration:
                break
            sizes.append((len(batch), batch.nbytes))
    return _gathered(shard, sizes, limit, whole)


def _gathered(
    shard: Shard, sizes: list[tuple[int, int]], limit: int | None, whole: bool
) -> tuple[list[Shard], int]:
    """Consecutive (rows, bytes) gathered to pieces of 4 to 16 MiB; what is larger alone is a piece alone."""
    stop = None if limit is None else min(limit, sum(rows for rows, _ in sizes))
    shard = replace(shard, stop=stop)
    if whole:
        return [shard], stop or 0
    pieces: list[Shard] = []
    start = first_row = rows = num_bytes = 0
    for index, (more_rows, more_bytes) in enumerate([*sizes, (0, MOST_BYTES_PER_PIECE)]):
        full = num_bytes >= BYTES_PER_PIECE or num_bytes + more_bytes > MOST_BYTES_PER_PIECE
        if rows and (full or index == len(sizes)):
            if stop is None or first_row < stop:
                pieces.append(replace(shard, start=start, length=index - start, first_row=first_row))
            start, first_row, rows, num_bytes = index, first_row + rows, 0, 0
        rows += more_rows
        num_bytes += more_bytes
    return pieces, stop or 0
