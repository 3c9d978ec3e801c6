"""Forest attention on a GPU through torch's FlexAttention: the definition as a mask of blocks.

Key k is seen by the queries k .. `reach[k]` - 1. Blocks of 128 x 128 that hold no such pair are skipped,
those that hold nothing else are not masked; both follow from each key block's least and largest reach, so no
T x T mask is built. Compiled on a GPU, once for all lengths; not compiled (CPU) it is a slow reference, and
has no backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rayrm.data.packing import Indices
from rayrm.model.host_copy import copied

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Flex:
    """The blocks of one batch."""

    blocks: BlockMask

    @classmethod
    def of(cls, reach: Indices, device: torch.device) -> Flex:
        """`reach` `[T]`: for each key the first query that no longer sees it."""
        last_seen = copied(reach, device)

        def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key <= query) & (query < last_seen[key])

        some, whole = _block_kinds(reach)
        return cls(
            BlockMask.from_kv_blocks(
                *_ordered(some & ~whole, device),
                *_ordered(whole, device),
                BLOCK_SIZE=_BLOCK,
                mask_mod=seen,
                seq_lengths=(len(reach), len(reach)),
            )
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, H, T, D]`."""
        kernel = _compiled() if query.is_cuda else flex_attention
        attended: torch.Tensor = kernel(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self.blocks,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended


@cache
def _capped(softcap: float) -> Any:
    """One function for each cap: another would be compiled anew."""

    def cap(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _block_kinds(reach: Indices) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bool `[query blocks, key blocks]` twice: where some pair is seen, and where every pair is."""
    num_tokens = len(reach)
    num_blocks = -(-num_tokens // _BLOCK)
    padded = np.pad(reach, (0, num_blocks * _BLOCK - num_tokens)).reshape(num_blocks, _BLOCK)
    blocks = np.arange(num_blocks)
    begin, end = blocks[:, None] * _BLOCK, (blocks[:, None] + 1) * _BLOCK
    before = blocks < blocks[:, None]
    some = (blocks == blocks[:, None]) | (before & (padded.max(axis=1) > begin))
    # A last block of queries that is not full is masked throughout, as torch's own masks have it.
    whole = before & (padded.min(axis=1) >= end) & (end <= num_tokens)
    return some, whole


def _ordered(blocks: np.ndarray[Any, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For B query blocks: the number of their key blocks, int32 `[1, 1, B]`, and which, `[1, 1, B, B]`."""
    counts = torch.from_numpy(blocks.sum(axis=1, dtype=np.int32))
    first = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))
    return copied(counts[None, None], device), copied(first[None, None], device)
