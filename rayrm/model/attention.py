"""Attention over a token forest: each token sees its segment's ancestors and, causally, its own segment.

`dense_mask` is the definition; the segment loop is what training runs, and a test holds the two equal,
forward and backward. The loop costs one SDPA call per run of segments and layer, and no T x T mask.

transformers looks the implementation up by name in the model's config at call time, also when gradient
checkpointing recomputes a layer during backward; so the name stays set for as long as the model trains
(`forest_attention_enabled` at load, `restore_attention` before the model is handed out). A call without a
`forest` is exactly transformers' own SDPA. The 4D mask that packed calls pass is an empty stand-in: passed
4D, transformers hands it through untouched instead of building masks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayrm.data.packing import Indices, PackedBatch, ancestors_of, attention_runs

FOREST = "rayrm_forest"


@dataclass(frozen=True, slots=True)
class _Run:
    """One causal block of queries: `length` tokens, the segments whose keys it sees, and its mask."""

    segments: tuple[int, ...]
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Forest:
    """What attention needs to know of a packed batch. Tensors live on the batch's device."""

    segment_lengths: list[int]
    run_lengths: list[int]
    runs: list[_Run]
    dense: torch.Tensor | None = None

    def to(self, device: torch.device) -> Forest:
        """The same forest with its masks on `device`."""
        runs = [_Run(r.segments, None if r.mask is None else r.mask.to(device)) for r in self.runs]
        dense = None if self.dense is None else self.dense.to(device)
        return Forest(self.segment_lengths, self.run_lengths, runs, dense)


def forest_of(batch: PackedBatch, *, dense: bool = False) -> Forest:
    """Plan the attention calls of a batch; `dense=True` takes the T x T definition instead of the loop."""
    lengths = [int(length) for length in batch.length]
    run_lengths: list[int] = []
    runs: list[_Run] = []
    for run in attention_runs(batch.parent):
        own = sum(lengths[s] for s in run.segments)
        above = sum(lengths[s] for s in run.ancestors)
        mask = None
        if above:
            # Lower right: the last query sees every key.
            mask = torch.ones(own, above + own, dtype=torch.bool).tril(diagonal=above)
        run_lengths.append(own)
        runs.append(_Run(run.ancestors + run.segments, mask))
    return Forest(lengths, run_lengths, runs, dense_mask(batch) if dense else None)


def dense_mask(batch: PackedBatch) -> torch.Tensor:
    """The definition: bool `[T, T]`, True where query token (row) sees key token (column)."""
    num_segments = len(batch.parent)
    above = np.eye(num_segments, dtype=bool)
    for segment in range(num_segments):
        above[segment, list(ancestors_of(batch.parent, segment))] = True
    segment_of: Indices = np.repeat(np.arange(num_segments), batch.length)
    causal = batch.positions[:, None] >= batch.positions[None, :]
    return torch.from_numpy(above[segment_of][:, segment_of] & causal)


def _segment_loop(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, forest: Forest, scaling: float | None
) -> torch.Tensor:
    # split and cat, not slices: the backward of a slice writes a zero-filled tensor of the whole length.
    keys = torch.split(key, forest.segment_lengths, dim=2)
    values = torch.split(value, forest.segment_lengths, dim=2)
    outputs = []
    for run, queries in zip(forest.runs, torch.split(query, forest.run_lengths, dim=2), strict=True):
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


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]`.

    Gives `[1, T, H, D]`. Without a `forest` this is transformers' SDPA with whatever mask it was given.
    """
    if forest is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    assert dropout == 0.0, "a forest shares tokens between sides: dropout masks would be shared too"
    # Dropped silently they would change the scores; `choose_layout` keeps such models away.
    assert kwargs.get("s_aux") is None, "attention sinks are no plain softmax"
    assert kwargs.get("softcap") is None, "soft-capped logits are no plain softmax"
    if forest.dense is not None:
        grouped = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=forest.dense, scale=scaling, enable_gqa=grouped
        )
    else:
        attended = _segment_loop(query, key, value, forest, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(FOREST, forest_attention)
# Registered under both: a name without a mask function gets no mask at all; padding would vanish silently.
AttentionMaskInterface.register(FOREST, sdpa_mask)


def enable_forest_attention(model: PreTrainedModel) -> str:
    """Let `model` take a `forest` keyword, and give back the implementation it had.

    Without the keyword the model computes what SDPA computes.
    """
    before: str = model.config._attn_implementation
    model.config._attn_implementation = FOREST
    return "sdpa" if before == FOREST else before


def restore_attention(model: PreTrainedModel, implementation: str = "sdpa") -> None:
    """Give the model back as transformers knows it."""
    if model.config._attn_implementation == FOREST:
        model.config._attn_implementation = implementation
