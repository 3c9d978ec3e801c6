"""Packed arrays -> scores: the one `nn.Module` that every engine wraps and every caller calls.

Shapes: T packed tokens, N scores, C comparisons. The stock forward (`padded`) and the packed ones give the
same scores; the head's product is in float32 whatever the autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rayrm.data.packing import PackedBatch
from rayrm.model.attention import Forest, enable_forest_attention, forest_of, restore_attention
from rayrm.model.layout import Layout, unwrapped


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A `PackedBatch` as tensors. `ids`, `positions` `[1, T]`; `pooled` `[N]`; comparisons `[C]`."""

    ids: torch.Tensor
    positions: torch.Tensor
    pooled: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    forest: Forest


def to_device(batch: PackedBatch, device: torch.device, *, dense: bool = False) -> DeviceBatch:
    """Move a batch to `device`; `dense=True` attends by the T x T definition: the reference in tests."""

    def tensor(array: object) -> torch.Tensor:
        return torch.as_tensor(array).to(device, non_blocking=True)

    return DeviceBatch(
        ids=tensor(batch.ids)[None],
        positions=tensor(batch.positions)[None],
        pooled=tensor(batch.pooled),
        better=tensor(batch.better),
        worse=tensor(batch.worse),
        margin=tensor(batch.margin),
        weight=tensor(batch.weight),
        forest=forest_of(batch, dense=dense).to(device),
    )


class PackedScorer(torch.nn.Module):
    """A sequence-classification model with one label that takes packed batches.

    `model` is a transformers model or a PEFT wrapper around one. While it is wrapped its attention
    implementation is ours; `release()` gives it back as it was.
    """

    def __init__(
        self, model: torch.nn.Module, layout: Layout, *, pad_to_multiple_of: int | None = None
    ) -> None:
        super().__init__()
        self._multiple = pad_to_multiple_of or 1
        self.model = model
        self.layout = layout
        self._before = "sdpa"
        if layout.name != "padded":
            self._before = enable_forest_attention(unwrapped(model))

    def release(self) -> torch.nn.Module:
        """The model, with the attention implementation it had."""
        restore_attention(unwrapped(self.model), self._before)
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
            forest=batch.forest,
        ).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            scores: torch.Tensor = inner.score(hidden[0, batch.pooled].to(inner.score.weight.dtype))
        return scores[:, 0].float()

    def _forward_padded(self, batch: DeviceBatch) -> torch.Tensor:
        """Right-padded rows through the model's own forward, which pools by its own rule."""
        config = unwrapped(self.model).config.get_text_config()
        rows = torch.split(batch.ids[0], batch.forest.segment_lengths)
        assert len(rows) == len(batch.pooled), "the padded layout takes batches packed without sharing"
        # Without a pad id transformers takes one row at a time, and that row needs no padding.
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
        ids = F.pad(ids, (0, -ids.shape[1] % self._multiple), value=pad)
        lengths = torch.tensor(batch.forest.segment_lengths, device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        scores: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return scores[:, 0].float()
