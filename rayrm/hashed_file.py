"""Files hashed while they are written, the large ones past the page cache where the file system allows it.

A checkpoint is not read again soon. Through the page cache its gigabytes cost the processors a copy, and push
out what training reads; with O_DIRECT the device fetches them from memory by itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_CHUNK = 16 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def write_hashed(
    file: Path, parts: Iterable[bytes | memoryview], between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write the parts one after the other; on the disk at return. Returns `size` in bytes and `sha256`.

    `between` is called before each 16 MiB, and may raise to end the writing.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _set_direct(descriptor, True)
        for chunk in _chunks(parts):
            between()
            digest.update(chunk)
            size += len(chunk)
            _write(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The bytes in chunks of one size, but for the last: always the same memory, which begins at a page's."""
    chunk, filled = memoryview(mmap.mmap(-1, _CHUNK)), 0
    for part in parts:
        rest = memoryview(part).cast("B")
        while rest:
            taken = min(len(rest), _CHUNK - filled)
            chunk[filled : filled + taken] = rest[:taken]
            filled, rest = filled + taken, rest[taken:]
            if filled == _CHUNK:
                yield chunk
                filled = 0
    if filled:
        yield chunk[:filled]


def _write(descriptor: int, chunk: memoryview) -> None:
    if len(chunk) < _CHUNK:
        _set_direct(descriptor, False)  # whole blocks only
    written = 0
    while written < len(chunk):
        try:
            written += os.write(descriptor, chunk[written:])
        except OSError as error:
            # A file system may take the flag and not the write; or a write ended within a block.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether this changed where writes go."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | _DIRECT if direct else flags & ~_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError:  # not on this file system
        return False
    return wanted != flags
