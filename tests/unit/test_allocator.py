"""Freed memory stays with the process inside the block, and goes back at its end."""

from __future__ import annotations

import resource

import pytest
import torch

from rayrm.train.allocator import keep_freed_memory

CPU = torch.device("cpu")
PAGE = resource.getpagesize()
NUM_BYTES = 2**26


def _new_pages() -> int:
    """How many pages the kernel maps while one large tensor is written, freed, and written again."""
    torch.ones(NUM_BYTES // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(NUM_BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_freed_tensor_s_memory_is_used_again_inside_the_block_only() -> None:
    if _new_pages() < NUM_BYTES // PAGE // 1024:
        pytest.skip("this C library keeps freed memory by itself")
    with keep_freed_memory(CPU):
        assert _new_pages() < 16
    assert _new_pages() > 16


def test_memory_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), keep_freed_memory(CPU):
        raise RuntimeError("stop")
    assert _new_pages() > 16
