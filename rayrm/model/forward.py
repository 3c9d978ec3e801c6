"""Packed arrays -> scores: the one `nn.Module` that every engine wraps and every caller calls.

Shapes: T packed tokens, N scores, C comparisons. The stock forward (`padded`) and the packed ones give the
same scores; the head's product is in float32 whatever the autocast.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rayrm.data.packing import PackedBatch
from rayrm.model.attention import (
    Attention,
    AttentionPath,
    Dense,
    attention_of,
    dense_mask,
    enable_forest_attention,
    restore_attention,
)
from rayrm.model.last_layer import PooledAttention, pool_last_layer
from rayrm.model.layout import Layout, unwrapped
from rayrm.model.rms_norm import block_norms
from rayrm.model.rope import fuse_rope


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A `PackedBatch` as tensors. `ids`, `positions` `[1, T]`; `pooled` `[N]`; comparisons `[C]`.

    `attention` is None for the padded layout, which splits `ids` into rows by `segment_lengths`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    pooled: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    segment_lengths: list[int]
    attention: Attention | None


def to_device(batch: PackedBatch, device: torch.device, path: AttentionPath | None) -> DeviceBatch:
    """Move a batch to `device` and plan its attention on a path (None: the padded layout has no plan)."""

    def tensor(array: object) -> torch.Tensor:
        return torch.as_tensor(array).to(device, non_blocking=True)

    pooled = tensor(batch.pooled)
    attention: Attention | None = None
    if path is not None:
        at_pooled = Dense(tensor(dense_mask(batch, batch.pooled)))
        attention = PooledAttention(attention_of(batch, path, device), pooled, at_pooled)
    return DeviceBatch(
        ids=tensor(batch.ids)[None],
        positions=tensor(batch.positions)[None],
        pooled=pooled,
        better=tensor(batch.better),
        worse=tensor(batch.worse),
        margin=tensor(batch.margin),
        weight=tensor(batch.weight),
        segment_lengths=batch.length.tolist(),
        attention=attention,
    )


class PackedScorer(torch.nn.Module):
    """A sequence-classification model with one label that takes packed batches.

    `model` is a transformers model or a PEFT wrapper around one. While it is wrapped its attention, its last
    layer and, on a CPU, its norms and rotations compute by our code; `release()` gives it back as it was.
    `path` computes the attention of packed batches (None with the padded layout). `pooled_last_layer=False`
    computes the last layer for every token.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        *,
        path: AttentionPath = "loop",
        pooled_last_layer: bool = True,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        self._multiple = pad_to_multiple_of or 1
        self.model = model
        self.layout = layout
        self.path: AttentionPath | None = None if layout.name == "padded" else path
        self._pools_last_layer = self.path is not None and pooled_last_layer
        # A decoder would keep the keys and values of every layer for texts that do not go on.
        takes_cache = "use_cache" in inspect.signature(unwrapped(model).forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}
        self._undo = contextlib.ExitStack()
        self._undo.callback(block_norms(model))
        self._undo.callback(fuse_rope(model))
        if self.path is not None:
            before = enable_forest_attention(unwrapped(model))
            self._undo.callback(restore_attention, unwrapped(model), before)
        if self._pools_last_layer:
            self._undo.callback(pool_last_layer(unwrapped(model).base_model))
        # A scorer that is dropped gives back what it took, as one that is released.
        weakref.finalize(self, self._undo.close)

    def release(self) -> torch.nn.Module:
        """The model, computing as it did before it was wrapped."""
        self._undo.close()
        self._pools_last_layer = False
        return self.model

    def forward(self, batch: DeviceBatch) -> torch.Tensor:
        """Scores `[N]`, float32."""
        if self.layout.name == "padded":
            return self._forward_padded(batch)
        inner = unwrapped(self.model)
        # 4D and empty: transformers passes a 4D mask through as it is and builds none of its own.
        stand_in = torch.empty((1, 1, 0, 0), device=batch.ids.device)
        hidden = inner.base_model(
            input_ids=batch.ids,
            attention_mask=stand_in,
            position_ids=batch.positions,
            use_cache=False,
            forest=batch.attention,
        ).last_hidden_state[0]
        if not self._pools_last_layer:
            hidden = hidden[batch.pooled]
        with torch.autocast(hidden.device.type, enabled=False):
            scores: torch.Tensor = inner.score(hidden.to(inner.score.weight.dtype))
        return scores[:, 0].float()

    def _forward_padded(self, batch: DeviceBatch) -> torch.Tensor:
        """Right-padded rows through the model's own forward, which pools by its own rule."""
        config = unwrapped(self.model).config.get_text_config()
        rows = torch.split(batch.ids[0], batch.segment_lengths)
        assert len(rows) == len(batch.pooled), "the padded layout takes batches packed without sharing"
        # Without a pad id transformers takes one row at a time, and that row needs no padding.
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
        ids = F.pad(ids, (0, -ids.shape[1] % self._multiple), value=pad)
        lengths = torch.tensor(batch.segment_lengths, device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        scores: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, **self._options).logits
        return scores[:, 0].float()
