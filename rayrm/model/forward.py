"""Packed arrays -> scores: the one `nn.Module` that every engine wraps and every caller calls.

Shapes: T packed tokens, N scores, C comparisons, A attributes. The stock forward (`padded`) and the packed
ones give the same scores; the head's product is in its weights' precision whatever the autocast.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rayrm.data.packing import PackedBatch, padded_to
from rayrm.errors import ConfigError
from rayrm.model.attention import (
    Attention,
    AttentionPath,
    Dense,
    attention_of,
    dense_mask,
    enable_forest_attention,
    restore_attention,
)
from rayrm.model.attribute_head import attribute_head_of, compute_instead
from rayrm.model.head import exact_head
from rayrm.model.host_copy import copied
from rayrm.model.last_layer import PooledAttention, pool_last_layer
from rayrm.model.layout import Layout, unwrapped
from rayrm.model.loss import DeviceTerms, tensors_of
from rayrm.model.rms_norm import block_norms
from rayrm.model.rope import fuse_rope
from rayrm.model.scaling_rope import ScalingRope, forget_longer_texts
from rayrm.model.sequence import AttentionInParts, SequencePart
from rayrm.model.sharded import is_sharded


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch(DeviceTerms):
    """A `PackedBatch` as tensors. `ids`, `positions` `[1, T]`; `pooled` `[N]`; the loss's terms.

    `attention` is None for rows to be padded: `ids` is split into them by `segment_lengths`.
    Where ranks compute the batch together, `ids`, `positions` and `pooled` are of this rank's tokens, and
    `mine` bool `[N]` says which scores are read at them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    pooled: torch.Tensor
    segment_lengths: list[int]
    attention: Attention | None
    mine: torch.Tensor | None = None


def to_device(
    batch: PackedBatch, device: torch.device, path: AttentionPath | None, part: SequencePart | None = None
) -> DeviceBatch:
    """Move a batch to `device` and plan its attention on a path (None: its rows are to be padded).

    `part`: only this rank's part of its tokens; every rank of the group moves the same batch.
    """

    def tensor(array: object) -> torch.Tensor:
        return copied(array, device)

    if part is not None:
        return _part_to_device(batch, device, path, part, tensor)
    pooled = tensor(batch.pooled)
    attention: Attention | None = None
    if path is not None:
        at_pooled = Dense(tensor(dense_mask(batch, batch.pooled)))
        attention = PooledAttention(attention_of(batch, path, device), pooled, at_pooled)
    return DeviceBatch(
        ids=tensor(batch.ids)[None],
        positions=tensor(batch.positions)[None],
        pooled=pooled,
        **tensors_of(batch, tensor),
        segment_lengths=batch.length.tolist(),
        attention=attention,
    )


def _part_to_device(
    batch: PackedBatch,
    device: torch.device,
    path: AttentionPath | None,
    part: SequencePart,
    tensor: Callable[[object], torch.Tensor],
) -> DeviceBatch:
    assert path is not None, "`check_layout` keeps padded rows away"
    batch = padded_to(batch, part.size)
    length = batch.num_tokens // part.size
    begin = part.place * length
    tokens = slice(begin, begin + length)
    positions = tensor(batch.positions[tokens])[None]
    place = batch.pooled - begin
    return DeviceBatch(
        ids=tensor(batch.ids[tokens])[None],
        positions=positions,
        # Of another rank's token whichever is nearest: its score is left out.
        pooled=tensor(place.clip(0, length - 1)),
        **tensors_of(batch, tensor),
        segment_lengths=batch.length.tolist(),
        attention=AttentionInParts(attention_of(batch, path, device), part, positions),
        mine=tensor((place >= 0) & (place < length)),
    )


class PackedScorer(torch.nn.Module):
    """A sequence-classification model with one label that takes packed batches.

    `model` is a transformers model or a PEFT wrapper around one. While it is wrapped its head, its attention,
    its last layer and, on a CPU, its norms and rotations compute by our code; `release()` gives it back as it
    was. A batch without a plan of attention is padded whatever the layout: its rows may be too long to share.
    `path` computes the attention of packed batches (None with the padded layout). `pooled_last_layer=False`
    computes the last layer for every token; so does `part`, by which each batch is one of several ranks'.
    Where attributes were put beside the model, their heads compute in the place of its own, and are
    `attributes` here.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        *,
        path: AttentionPath = "loop",
        pooled_last_layer: bool = True,
        pad_to_multiple_of: int | None = None,
        part: SequencePart | None = None,
    ) -> None:
        super().__init__()
        self.part = part
        self._multiple = pad_to_multiple_of or 1
        self.model = model
        self.layout = layout
        self.path: AttentionPath | None = None if layout.name == "padded" else path
        self._pools_last_layer = self.path is not None and pooled_last_layer and part is None
        # A decoder would keep the keys and values of every layer for texts that do not go on.
        takes_cache = "use_cache" in inspect.signature(unwrapped(model).forward).parameters
        self._rope = ScalingRope.of(unwrapped(model).config.get_text_config())
        self._options = {"use_cache": False} if takes_cache else {}
        self._undo = contextlib.ExitStack()
        self._undo.callback(exact_head(model))
        self.attributes = attribute_head_of(model)
        if self.attributes is not None:
            self.attributes.to(next(model.parameters()).device)
            self._undo.callback(compute_instead(model, self.attributes))
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
        """Scores `[N]`, float32; with attributes `[N, 1 + A]`, their ratings beside each score."""
        if batch.attention is None:
            return self._forward_padded(batch)
        if self._rope is not None:
            forget_longer_texts(self.model)
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
        outputs = self._outputs(inner.score(hidden))
        if batch.mine is None:
            return outputs
        assert self.part is not None
        mine = batch.mine if outputs.dim() == 1 else batch.mine[:, None]
        return self.part.summed(torch.where(mine, outputs, 0.0))

    def _outputs(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] if self.attributes is None else logits).float()

    def _forward_padded(self, batch: DeviceBatch) -> torch.Tensor:
        """Each row's score as of the row alone, by as many forwards as the model asks for."""
        rows = torch.split(batch.ids[0], batch.segment_lengths)
        assert len(rows) == len(batch.pooled), "padded rows are packed without sharing"
        found: dict[int, torch.Tensor] = {}
        for members in self._forwards(batch.segment_lengths):
            if self._rope is not None:
                forget_longer_texts(self.model)
            scores = self._scores_of([rows[n] for n in members])
            found |= zip(members, scores.unbind(), strict=True)
        return torch.stack([found[n] for n in range(len(rows))])

    def _forwards(self, lengths: list[int]) -> list[list[int]]:
        """Which rows are computed in one forward: all of them, where nothing is against it."""
        if self._pad is None:
            return [[n] for n in range(len(lengths))]  # transformers takes no more at a time
        if self._rope is None:
            return [list(range(len(lengths)))]
        if max(lengths) > self._rope.limit:
            self._check_sharding(self._rope)
        return self._rope.forwards(lengths)

    def _scores_of(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Right-padded rows through the model's own forward, which pools by its own rule."""
        # Without a pad id it is one row, which needs no padding.
        pad = self._pad or 0
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
        # Padding counts as a position where positions scale with the longest.
        multiple = self._multiple if self._rope is None else 1
        ids = F.pad(ids, (0, -ids.shape[1] % multiple), value=pad)
        lengths = copied([len(row) for row in rows], ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return self._outputs(self.model(input_ids=ids, attention_mask=mask, **self._options).logits)

    @property
    def _pad(self) -> int | None:
        pad: int | None = unwrapped(self.model).config.get_text_config().pad_token_id
        return pad

    def _check_sharding(self, rope: ScalingRope) -> None:
        """Ranks that share weights must make equally many forwards; here that depends on the rows."""
        sharded = any(map(is_sharded, self.model.parameters()))
        if sharded and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"`zero_stage` (3) on {dist.get_world_size()} workers cannot train a model whose rope "
                f"({rope.kind}) scales with rows above {rope.limit} tokens: such rows take forwards of their "
                f"own, and ZeRO-3 wants equally many of every worker. Set `zero_stage=2`, or "
                f"`max_length={rope.limit}` (longer pairs are left out and counted)."
            )
