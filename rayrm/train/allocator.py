"""Freed memory kept for the next step: what a CPU run asks of the C library's allocator.

glibc gives large freed blocks back to the system at once, so that every activation and gradient of every
step is mapped anew and its pages are zeroed by the kernel again; for a small model that is a tenth of a step.
While `keep_freed_memory` lasts they stay with the process. It costs the process its peak memory for as long.
Other C libraries, and allocators loaded in malloc's place, are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

# mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_MIB = 2**20
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB}
# Where glibc's own thresholds, which move with use, end for programs that allocate large blocks.
_GIVE_BACK = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _TOP_PAD: _MIB // 8}


def give_freed_memory_back(device: torch.device) -> None:
    """Let the system have what this process has freed, where `device` is the CPU."""
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep this process's freed memory until the end of the block, where `device` is the CPU."""
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        yield
        return
    for option, value in _KEEP.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _GIVE_BACK.items():
            libc.mallopt(option, value)
        give_freed_memory_back(device)
