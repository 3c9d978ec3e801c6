"""One piece of a source -> tables of tokenized rows, from the token cache where it holds them. No ray.

`Reading` is produced by the driver and pickled to every task that reads; what it yields depends on the piece
and on the rules alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrm.data.blocks import SCHEMA, BlockIndex, index_of, tokenized_tables
from rayrm.data.cache import CachedBlock, TokenCache, blocks_of, file_hash, rules_of
from rayrm.data.labels import USUAL, LabelRules
from rayrm.data.pieces import TEXT_SUFFIXES, DatasetPart, Piece, RowChunk, Shard, SourceRow, StreamShard
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.sources import ROWS_PER_CHUNK, read_work
from rayrm.errors import ConfigError, DataError

_STOP = {"data": DataError, "config": ConfigError}


@dataclass(frozen=True, slots=True)
class Reading:
    """How pieces are read: the pickled tokenizer, the rules that shape rows, the cache (None: no cache)."""

    tokenizer: bytes
    max_length: int | None
    selection: Selection = EVERY_ROW
    cache: TokenCache | None = None
    labels: LabelRules = USUAL

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        pickled: bytes,
        *,
        max_length: int | None,
        selection: Selection = EVERY_ROW,
        token_cache: str | None = None,
        labels: LabelRules = USUAL,
    ) -> Reading:
        """`pickled` is the tokenizer, as a task unpickles it."""
        cache = None
        if token_cache is not None:
            rules = rules_of(tokenizer, max_length=max_length, selection=selection.rules, **labels.named)
            cache = TokenCache(token_cache, rules)
        return cls(pickled, max_length, selection, cache, labels)

    def tables(self, piece: Piece) -> Iterator[pa.Table]:
        """The piece's rows, accepted and refused; an error that ends the reading is a table."""
        try:
            if self.cache is None or not is_cacheable(piece):
                yield from self._tokenized(read_work(piece))
                return
            assert not isinstance(piece, StreamShard)
            yield from self.cache.tables(
                content_of(piece), piece.source, lambda: self._tokenized(read_work(piece))
            )
        except (DataError, ConfigError) as error:
            yield stop_table(error)

    def cached(self, piece: Piece) -> list[tuple[CachedBlock, BlockIndex]]:
        """The piece's blocks in the cache, made where they are not there, with their indices."""
        blocks = blocks_of(self._entry(piece), piece.source)
        return [(block, index_of(block.table())) for block in blocks]

    def rows(self, rows: Iterator[SourceRow]) -> Iterator[pa.Table]:
        """As `tables`, of rows that were read already."""
        try:
            yield from self._tokenized(rows)
        except (DataError, ConfigError) as error:
            yield stop_table(error)

    def _tokenized(self, rows: Iterator[SourceRow]) -> Iterator[pa.Table]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
        tokenizer = _load_tokenizer(self.tokenizer)
        yield from tokenized_tables(
            rows, tokenizer, self.max_length, selection=self.selection, labels=self.labels
        )

    def _entry(self, piece: Piece) -> Path:
        assert self.cache is not None
        assert not isinstance(piece, StreamShard)
        return self.cache.entry(content_of(piece), lambda: self._tokenized(read_work(piece)))


def is_cacheable(piece: Piece) -> bool:
    """Whether its content can be named without reading it: not of a stream, nor of an undated remote file."""
    if isinstance(piece, StreamShard):
        return False
    return not isinstance(piece, Shard) or piece.remote is None or piece.mtime_ns is not None


def content_of(piece: Shard | RowChunk | DatasetPart) -> str:
    """What names a piece's content: a hash of it, wherever it lies, and which part of its file it is.

    A remote file is not read for that: its URL, size and time of change stand for its content.
    """
    if isinstance(piece, RowChunk):
        held = hashlib.blake2b(piece.pickled, digest_size=16).hexdigest()
        return f"{held} from {piece.start} {piece.columns}"
    if isinstance(piece, DatasetPart):
        return f"{_hash_of_rows(piece)} from {piece.start} {piece.columns}"
    part = replace(piece, source=0, path="", size=None, mtime_ns=None, remote=None)
    if piece.remote is not None:
        return f"{piece.path} {piece.size} {piece.mtime_ns} {part}"
    status = os.stat(piece.path)
    ranged = piece.length is not None and piece.path.endswith(TEXT_SUFFIXES)
    where = (piece.start, piece.length) if ranged else (0, None)  # row groups and batches are no bytes
    content = file_hash(piece.path, status.st_size, status.st_mtime_ns, *where)
    return f"{content} {Path(piece.path).suffix} {part}"


def _hash_of_rows(piece: DatasetPart) -> str:
    """A hash of the rows as they are read: files do not tell what a dataset's format makes of them."""
    content = hashlib.blake2b(digest_size=16)
    rows = read_work(replace(piece, columns=()))
    while chunk := [row.content for row in islice(rows, ROWS_PER_CHUNK)]:
        content.update(pickle.dumps(chunk))
    return content.hexdigest()


@functools.lru_cache(maxsize=2)
def _load_tokenizer(pickled: bytes) -> Any:
    """Unpickled once a worker process: with a large vocabulary that takes longer than a task's work."""
    return pickle.loads(pickled)


def stop_table(error: DataError | ConfigError) -> pa.Table:
    """An error that ends the whole reading, as a row: so it travels without a task's stack trace."""
    kind = "config" if isinstance(error, ConfigError) else "data"
    stop = {"source": 0, "row": 0, "ids": [], "digest": bytes(16), "reason": f"!{kind}"}
    return pa.Table.from_pylist([{**stop, "message": str(error), "raw": ""}], SCHEMA)


def raise_if_stopped(index: BlockIndex) -> None:
    """Raises the error of a `stop_table`."""
    for refusal in index.refusals:
        if refusal.reason.startswith("!"):
            raise _STOP[refusal.reason[1:]](refusal.message)
