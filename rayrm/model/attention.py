"""Attention over a token forest: each token sees its segment's ancestors and, causally, its own segment.

In depth-first order that is one comparison: key k is seen by the queries k .. `reach[k]` - 1, where `reach`
is the end of the subtree of k's segment. `Dense` is that definition as a mask; every other path is tested to
equal it, forward and backward.

transformers looks the implementation up by name in the model's config at call time, also when gradient
checkpointing recomputes a layer during backward; so the name stays set for as long as the model trains
(`enable_forest_attention` at load, `restore_attention` before the model is handed out). A call without a
`forest` is exactly transformers' own SDPA (its eager attention where logits are soft-capped). The 4D mask
that packed calls pass is an empty stand-in: passed 4D, transformers hands it through untouched instead of
building masks of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayrm.data.packing import Indices, PackedBatch
from rayrm.model.flex import Flex
from rayrm.model.segment_loop import SegmentLoop, masked_attention
from rayrm.model.tiled import Tiled
from rayrm.model.varlen import Varlen

FOREST = "rayrm_forest"
AttentionPath = Literal["loop", "tiled", "varlen", "flex", "dense"]


class Attention(Protocol):
    """How the queries of one batch meet their keys. What it needs lives on the batch's device."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, H, T, D]`.

        `softcap` c: logits x become c tanh(x / c). Only paths that `choose_path` takes for such models do it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """The definition: every query against every key, under a bool mask `[queries, T]`."""

    mask: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> Dense:
        return cls(torch.from_numpy(dense_mask(batch)).to(device))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        return masked_attention(query, key, value, self.mask, scaling, softcap)


def attention_of(batch: PackedBatch, path: AttentionPath, device: torch.device) -> Attention:
    """The plan of a batch's attention on one of the paths."""
    match path:
        case "loop":
            return SegmentLoop.of(batch, device)
        case "tiled":
            return Tiled.of(batch)
        case "varlen":
            return Varlen.of(batch, device)
        case "flex":
            return Flex.of(reach_of(batch), device)
        case "dense":
            return Dense.of(batch, device)


def reach_of(batch: PackedBatch) -> Indices:
    """`[T]`: for each key the first query index that no longer sees it, the end of its segment's subtree."""
    ends = batch.start + batch.length
    for segment in range(len(ends) - 1, -1, -1):
        above = batch.parent[segment]
        if above >= 0:
            ends[above] = max(ends[above], ends[segment])
    return np.repeat(ends, batch.length)


def dense_mask(batch: PackedBatch, queries: Indices | None = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Bool `[queries, T]`, True where the query token (row) sees the key token (column).

    `queries`: packed indices of some tokens only; None: all T.
    """
    keys = np.arange(batch.num_tokens)
    rows = (keys if queries is None else queries)[:, None]
    mask: np.ndarray[Any, np.dtype[np.bool_]] = (keys <= rows) & (rows < reach_of(batch))
    return mask


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    forest: Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]`.

    Gives `[1, T, H, D]`. Without a `forest` this is transformers' SDPA with whatever mask it was given, or
    with a `softcap` transformers' eager attention.
    """
    if forest is None and softcap is not None:
        assert dropout == 0.0, "a model whose attention is replaced has no dropout in training"
        padded = masked_attention(query, key, value, attention_mask, scaling, softcap)
        return padded.transpose(1, 2).contiguous(), None
    if forest is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    assert dropout == 0.0, "a forest shares tokens between sides: dropout masks would be shared too"
    # Dropped silently they would change the scores; `choose_layout` keeps such models away.
    assert kwargs.get("s_aux") is None, "attention sinks are no plain softmax"
    assert attention_mask is None or attention_mask.numel() == 0, "a mask beside the forest"
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Autocast knows SDPA; of the other kernels it knows nothing, and rotary positions leave float32.
        half = torch.get_autocast_dtype(kind)
        query, key, value = query.to(half), key.to(half), value.to(half)
    return forest.attend(query, key, value, scaling, softcap).transpose(1, 2).contiguous(), None


AttentionInterface.register(FOREST, forest_attention)
# Registered under both: a name without a mask function gets no mask at all; padding would vanish silently.
AttentionMaskInterface.register(FOREST, sdpa_mask)


def enable_forest_attention(model: PreTrainedModel) -> str:
    """Let `model` take a `forest` keyword, and give back the implementation it had.

    Without the keyword the model computes what SDPA computes.
    """
    before: str = model.config._attn_implementation
    model.config._attn_implementation = FOREST
    if before == FOREST:  # in a copy of a model that was wrapped
        return "sdpa" if model._supports_sdpa else "eager"
    return before


def restore_attention(model: PreTrainedModel, implementation: str = "sdpa") -> None:
    """Give the model back as transformers knows it."""
    if model.config._attn_implementation == FOREST:
        model.config._attn_implementation = implementation
