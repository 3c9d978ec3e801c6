"""Tokenized pieces of a source kept on disk, so that later epochs, resumes and sweeps do not tokenize again.

An entry is one Arrow file, named by what it was made of (content of the piece, tokenizer, template, rules)
and by a hash of itself: `<directory>/<first two of key>/<key>-<hash>.arrow`. It is written aside and renamed,
so that two runs may fill one cache at once; one that is not what its name says is deleted and made anew.
Entries hold no path and no place of the source among others: the same data elsewhere finds them. No ray.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrm.errors import DataError

_FORMAT = 3
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
        key, found = self._found(content)
        if found is not None:
            return found
        with self._writing(key) as aside:
            for table in make():
                aside.add(table)
            return aside.finish()

    def tables(self, content: str, source: int, make: Callable[[], Iterable[pa.Table]]) -> Iterator[pa.Table]:
        """The rows of that piece as rows of `source`: of its entry, or as `make` gives them, table by table.

        These are written aside as they pass; they are an entry when the last was taken, and none before.
        """
        key, found = self._found(content)
        if found is not None:
            for block in blocks_of(found, source):
                yield block.table()
            return
        with self._writing(key) as aside:
            for table in make():
                aside.add(table)
                yield table
            aside.finish()

    def _found(self, content: str) -> tuple[str, Path | None]:
        """The content's key, and its entry where there is a good one; a damaged one is deleted."""
        key = _hash_of(f"{_FORMAT} {self.rules} {content}".encode())
        for found in sorted(self._home(key).glob(f"{key}-*.arrow")):
            if _is_whole(found):
                return key, found
            with suppress(FileNotFoundError):
                found.unlink()
        return key, None

    def _home(self, key: str) -> Path:
        return Path(self.directory) / key[:2]

    @contextmanager
    def _writing(self, key: str) -> Iterator[_Aside]:
        """An entry to be written; nothing is left of one that is not finished within the block."""
        try:
            self._home(key).mkdir(parents=True, exist_ok=True)
            _delete_abandoned(self._home(key))
            aside = _Aside(self._home(key), key)
            try:
                yield aside
            finally:
                aside.drop()
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


class _Aside:
    """An entry while it is written, under a hidden name beside those that are whole.

    One record batch for about every `_BLOCK_BYTES` of rows.
    """

    def __init__(self, home: Path, key: str) -> None:
        from rayrm.data.blocks import SCHEMA

        descriptor, self._path = _locked_file(home, f".{key}-")
        self._whole = home / key
        self._content = hashlib.blake2b(digest_size=_HASH_SIZE)
        self._out = os.fdopen(descriptor, "wb")
        self._writer = pa.ipc.new_file(_Hashed(self._out, self._content), SCHEMA)
        self._held: list[pa.Table] = []
        self._held_bytes = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._held_bytes += table.nbytes
        if self._held_bytes >= _BLOCK_BYTES:
            self._write()

    def finish(self) -> Path:
        """The entry, whole and in its place."""
        if self._held:
            self._write()
        self._writer.close()
        self._out.flush()
        os.fsync(self._out.fileno())
        self._path.chmod(0o644)
        name = f"{self._whole.name}-{self._content.hexdigest()}.arrow"
        return self._path.rename(self._whole.with_name(name))

    def drop(self) -> None:
        """Closes the file, and deletes it if it was not finished."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written is tried once more, and is not wanted
            self._out.close()

    def _write(self) -> None:
        for batch in pa.concat_tables(self._held).combine_chunks().to_batches():
            self._writer.write_batch(batch)
        self._held, self._held_bytes = [], 0


def _locked_file(home: Path, prefix: str) -> tuple[int, Path]:
    """A new file that is locked as long as it is open: so others see whether its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=home, prefix=prefix)
        with suppress(OSError):  # a file system without locks: nobody else has one either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(name):
            return descriptor, Path(name)
        os.close(descriptor)  # taken for abandoned before it was locked


def _delete_abandoned(home: Path) -> None:
    """Delete what writers that were killed left: a stream's end kills tasks amid their pieces."""
    for path in home.glob(".*-*"):
        with suppress(OSError), path.open("r+b") as stream:  # locked by its writer, or gone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


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
