"""Forest attention as a loop of SDPA calls over segments: any device, no T x T mask, no repeated heads.

Costs one call for each run of segments (`attention_runs`) and layer: a pair takes two. `torch.split` and
`torch.cat`, not slices: the backward of a slice writes a zero-filled tensor of the whole length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rayrm.data.packing import PackedBatch, attention_runs


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
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, H, T, D]`."""
        keys = torch.split(key, self.segment_lengths, dim=2)
        values = torch.split(value, self.segment_lengths, dim=2)
        outputs = []
        for run, queries in zip(self.runs, torch.split(query, self.run_lengths, dim=2), strict=True):
            outputs.append(
                F.scaled_dot_product_attention(
                    queries,
                    _joined(keys, run.segments),
                    _joined(values, run.segments),
                    attn_mask=run.mask,
                    is_causal=run.mask is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(outputs, dim=2)


def _joined(parts: Sequence[torch.Tensor], segments: tuple[int, ...]) -> torch.Tensor:
    return parts[segments[0]] if len(segments) == 1 else torch.cat([parts[s] for s in segments], dim=2)
