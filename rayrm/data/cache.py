"""Tokenized pieces of a source kept on disk, so that later epochs, resumes and sweeps do not tokenize again.

An entry is one Arrow file, named by what it was made of (content of the piece, tokenizer, template, rules)
and by a hash of itself: `<directory>/<first two of key>/<key>-<hash>.arrow`. It is written aside and renamed,
so that two runs may fill one cache at once; one that is not what its name says is deleted and made anew.
Entries hold no path and no place of the source among others: the same data elsewhere finds them. No ray.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrm.errors import DataError

_FORMAT = 1
"""Raised when the same text would become other columns or other ids."""
_HASH_SIZE = 16
_BLOCK_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """Record batch number `batch` of an entry: rows that can be read in any process that sees the file.

    Entries know no source; here the rows are of the one with index `source`.
    """

    path: str
    batch: int
    source: int

    def table(self) -> pa.Table:
        """The rows, mapped from the file; a process's memory holds what of them is touched."""
        with pa.memory_map(self.path) as stream:
            table = pa.Table.from_batches([pa.ipc.open_file(stream).get_batch(self.batch)])
        source = pa.repeat(pa.scalar(self.source, pa.int32()), len(table))
        return table.set_column(table.schema.get_field_index("source"), "source", source)


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Entries under `directory` for one set of `rules` (a hash of all but the content that shapes rows)."""

    directory: str
    rules: str

    def entry(self, content: str, make: Callable[[], Iterable[pa.Table]]) -> Path:
        """The file of the piece with this content key, made by `make` where it is absent or damaged.

        Raises `DataError` where the directory cannot be written.
        """
        key = _hash_of(f"{_FORMAT} {self.rules} {content}".encode())
        home = Path(self.directory) / key[:2]
        for found in sorted(home.glob(f"{key}-*.arrow")):
            if _is_whole(found):
                return found
            with suppress(FileNotFoundError):
                found.unlink()
        try:
            home.mkdir(parents=True, exist_ok=True)
            return _write(home, key, make())
        except OSError as error:
            raise DataError(
                f"`token_cache` ({self.directory}) cannot be written ({error.strerror or error}): free space "
                "there, choose another directory, or leave it out"
            ) from error


def blocks_of(entry: Path, source: int) -> list[CachedBlock]:
    """The blocks of an entry, in order, as rows of the source with this index."""
    with pa.memory_map(str(entry)) as stream:
        return [
            CachedBlock(str(entry), n, source) for n in range(pa.ipc.open_file(stream).num_record_batches)
        ]


def rules_of(tokenizer: Any, *, versions: bool = True, **rules: Any) -> str:
    """A hash of what turns text into rows: the tokenizer with its template, library versions, `rules`."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        known: Any = [
            sorted(tokenizer.get_vocab().items()),
            repr(sorted(tokenizer.init_kwargs.items(), key=str)),
        ]
    else:
        known = json.loads(backend.to_str())
        for used in ("truncation", "padding"):  # what a call left behind
            known.pop(used, None)
    adds = ("add_bos_token", "add_eos_token", "split_special_tokens")
    told = {
        "tokenizer": known,
        "class": type(tokenizer).__qualname__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "adds": [getattr(tokenizer, name, None) for name in adds],
        "versions": [transformers.__version__, tokenizers.__version__] if versions else [],
        "rules": rules,
    }
    return _hash_of(json.dumps(told, sort_keys=True, default=str).encode())


@functools.lru_cache(maxsize=256)
def file_hash(path: str, size: int, modified_ns: int, start: int = 0, length: int | None = None) -> str:
    """The hash of a local file's content, or of `length` bytes of it.

    Read once a process while `size` and `modified_ns` stay.
    """
    content = hashlib.blake2b(digest_size=_HASH_SIZE)
    left = size if length is None else length
    with open(path, "rb") as stream:
        stream.seek(start)
        while left > 0 and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            content.update(chunk)
            left -= len(chunk)
    return content.hexdigest()


def _hash_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_HASH_SIZE).hexdigest()


def _is_whole(entry: Path) -> bool:
    try:
        status = entry.stat()
        return entry.stem.partition("-")[2] == file_hash(str(entry), status.st_size, status.st_mtime_ns)
    except OSError:
        return False


def _write(home: Path, key: str, tables: Iterable[pa.Table]) -> Path:
    descriptor, name = tempfile.mkstemp(dir=home, prefix=f".{key}-")
    aside = Path(name)
    try:
        content = hashlib.blake2b(digest_size=_HASH_SIZE)
        with os.fdopen(descriptor, "wb") as out:
            _write_tables(_Hashed(out, content), tables)
            out.flush()
            os.fsync(out.fileno())
        aside.chmod(0o644)
        return aside.rename(home / f"{key}-{content.hexdigest()}.arrow")
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _write_tables(out: Any, tables: Iterable[pa.Table]) -> None:
    """One record batch for about every `_BLOCK_BYTES` of rows."""
    from rayrm.data.blocks import SCHEMA

    with pa.ipc.new_file(out, SCHEMA) as writer:
        for table in gathered(tables, _BLOCK_BYTES):
            for batch in table.combine_chunks().to_batches():
                writer.write_batch(batch)


def gathered(tables: Iterable[pa.Table], num_bytes: int) -> Iterator[pa.Table]:
    """The same rows in tables of about `num_bytes` each, or fewer at the end."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= num_bytes:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


class _Hashed:
    """A file to write to whose bytes are hashed as they pass."""

    def __init__(self, out: Any, content: Any) -> None:
        self._out, self._content, self.closed = out, content, False

    def write(self, data: Any) -> int:
        self._content.update(data)
        written: int = self._out.write(data)
        return written

    def tell(self) -> int:
        place: int = self._out.tell()
        return place

    def flush(self) -> None:
        self._out.flush()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
