"""A file system with room for so many bytes, where one may be mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk_of(num_bytes: int, disk: Path) -> Iterator[Path]:
    """Mounted at `disk` within the block; skips the test where that is not permitted."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def give_more(disk: Path, num_bytes: int) -> None:
    """Let the mounted disk have room for `num_bytes` in all."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)
