"""Forest attention as a loop of SDPA calls over segments: any device, no T x T mask, no repeated heads.

Costs one call for each run of segments (`attention_runs`) and layer: a pair takes two. Soft-capped logits,
which SDPA does not have, are computed by matmuls. `torch.split` and `torch.cat`, not slices: the backward of
a slice writes a zero-filled tensor of the whole length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rayrm.data.packing import PackedBatch, attention_runs

_BLOCK = 256
"""Queries whose soft-capped logits are held at a time."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One causal block of queries: the segments whose keys it sees, and its mask."""

    segments: tuple[int, ...]
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SegmentLoop:
    """The calls of one batch."""

    segment_lengths: list[int]
    run_lengths: list[int]
    runs: list[_Run]

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> SegmentLoop:
        """Plan the calls; masks live on `device`."""
        lengths = [int(length) for length in batch.length]
        run_lengths: list[int] = []
        runs: list[_Run] = []
        for run in attention_runs(batch.parent):
            own = sum(lengths[s] for s in run.segments)
            above = sum(lengths[s] for s in run.ancestors)
            mask = None
            if above:
                # Lower right: the last query sees every key.
                mask = torch.ones(own, above + own, dtype=torch.bool, device=device).tril(diagonal=above)
            run_lengths.append(own)
            runs.append(_Run(run.ancestors + run.segments, mask))
        return cls(lengths, run_lengths, runs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, H, T, D]`."""
        keys = torch.split(key, self.segment_lengths, dim=2)
        values = torch.split(value, self.segment_lengths, dim=2)
        outputs = []
        for run, queries in zip(self.runs, torch.split(query, self.run_lengths, dim=2), strict=True):
            seen = _joined(keys, run.segments), _joined(values, run.segments)
            outputs.append(masked_attention(queries, *seen, run.mask, scaling, softcap))
        return torch.cat(outputs, dim=2)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """`query` `[B, H, Q, D]`, `key` and `value` `[B, K, S, D]` -> `[B, H, Q, D]`.

    `mask`: bool, `[Q, S]` or as transformers gives it `[B, 1, Q, S]`, True where a key is seen; None: causal.
    With a `softcap` c the logits x are c tanh(x / c): https://arxiv.org/abs/2408.00118. No kernel of SDPA has
    it: logits are computed in the precisions of transformers' eager attention, but a block of queries at a
    time and again in backward, so that memory grows evenly with tokens.
    """
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = []
    for number, part in enumerate(torch.split(query, _BLOCK, dim=2)):
        first = number * _BLOCK
        seen = None if mask is None else mask[..., first : first + _BLOCK, :]
        block = (part, key, value, seen, first, scale, softcap)
        attended.append(checkpoint(_capped, *block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(attended, dim=2)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    first: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """`masked_attention` of a block of queries, the first of which is number `first` of its run."""
    if mask is None:
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(diagonal=first)
    # [B, K, H / K, Q, D]: the heads of a group meet their key without a copy of it for each.
    groups = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])
    logits = torch.matmul(groups, key.unsqueeze(2).transpose(-1, -2)) * scale
    logits = torch.tanh(logits / softcap) * softcap
    hidden = ~(mask.unsqueeze(2) if mask.ndim == 4 else mask)
    # The least finite number: a padding query that sees nothing must not become NaN.
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value.unsqueeze(2)).flatten(1, 2)


def _joined(parts: Sequence[torch.Tensor], segments: tuple[int, ...]) -> torch.Tensor:
    return parts[segments[0]] if len(segments) == 1 else torch.cat([parts[s] for s in segments], dim=2)
