"""Files that are hashed while they are written: the same bytes whatever the file system allows."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayrm.hashed_file import write_hashed
from tests.small_disk import disk_of

MIB = 1 << 20
SIZES = [
    (),
    (0,),
    (5,),
    (16 * MIB,),
    (16 * MIB + 1,),
    (3, 16 * MIB, 0, 16 * MIB - 4, 7),
    (33 * MIB + 4096, 511),
]


def parts_of(sizes: tuple[int, ...]) -> list[bytes]:
    return [os.urandom(size) for size in sizes]


def assert_written(file: Path, parts: list[bytes]) -> None:
    content = b"".join(parts)
    told = write_hashed(file, [memoryview(part) for part in parts])
    assert file.read_bytes() == content
    assert told == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("sizes", SIZES)
def test_a_file_holds_its_parts_and_is_told_with_its_checksum(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"longer, from before" * MIB)
    assert_written(file, parts_of(sizes))


def test_a_file_system_in_memory_takes_it_too(tmp_path: Path) -> None:
    with disk_of(64 * MIB, tmp_path / "disk") as disk:
        assert_written(disk / "file", parts_of(SIZES[-1]))


def writes(answer: Callable[[int, int], int | None]) -> Callable[[int, memoryview], int]:
    """`os.write` where `answer(descriptor, size)` says how many bytes it takes (None: all)."""
    write = os.write

    def write_some(descriptor: int, data: memoryview) -> int:
        taken = answer(descriptor, len(data))
        return write(descriptor, data if taken is None else data[:taken])

    return write_some


def direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_a_file_system_that_takes_the_flag_and_not_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuse(descriptor: int, size: int) -> None:
        if direct(descriptor):
            refused.append(size)
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "write", writes(refuse))
    assert_written(tmp_path / "file", parts_of(SIZES[-1]))
    assert refused == [16 * MIB]


def test_a_write_that_ends_within_a_block_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(SIZES[-1])

    def in_pieces(descriptor: int, size: int) -> int | None:
        return None if direct(descriptor) else min(size, 1_000_003)

    monkeypatch.setattr(os, "write", writes(in_pieces))
    monkeypatch.setattr("rayrm.hashed_file._DIRECT", 0)
    assert_written(tmp_path / "file", parts)


def test_another_error_is_raised_and_ends_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", writes(full))
    with pytest.raises(OSError, match="No space left"):
        write_hashed(tmp_path / "file", parts_of((17 * MIB,)))


def test_what_is_called_between_chunks_can_end_it(tmp_path: Path) -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_hashed(tmp_path / "file", parts_of((64 * MIB,)), stop)
    assert (tmp_path / "file").stat().st_size == 32 * MIB
