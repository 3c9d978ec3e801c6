"""What a micro-batch holds at its peak, measured on one row through the model as it will train.

Precision, layout, adapter and gradient checkpointing are the run's; gradients are in place, as in every
micro-batch of a step but the first. The row's texts and their first halves are run forward and backward: the
difference of the two peaks is what a token takes. No gradient, weight or random state is changed.

The last layer's attention, of N scores to T tokens, is the one part that does not grow evenly with tokens: it
is measured by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from rayrm.data.packing import PackedBatch, pack_texts
from rayrm.data.tokenize import TokenizedRow
from rayrm.model.attention import Dense
from rayrm.model.attention_probe import softcap_of
from rayrm.model.cost import head_sizes
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import unwrapped
from rayrm.train.peak_memory import peak_bytes
from rayrm.train.precision import Precision, autocast_dtype, in_precision
from rayrm.train.step import computed_tokens

_PROBE_LENGTH = 512
"""Without padding memory grows evenly with tokens, so that the beginnings of long texts tell enough."""
_MASK = 512
"""Scores, and tokens, of the last layer's attention as measured: many, to hide what grows with one alone."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a micro-batch holds at its peak: `fixed` bytes, `per_token` more for each of its tokens, and
    `per_mask_entry` for each of its scores x tokens."""

    fixed: float
    per_token: float
    per_mask_entry: float = 0.0

    def of(self, num_tokens: int, num_scores: float = 0) -> float:
        """Bytes of a micro-batch of `num_tokens`, of which `num_scores` are read."""
        return self.fixed + (self.per_token + self.per_mask_entry * num_scores) * num_tokens


@dataclass(frozen=True, slots=True)
class Probe:
    """The model as it will train, and what it is tried on; `pad_token_id` is the model's."""

    module: PackedScorer
    precision: Precision
    device: torch.device
    pad_token_id: int | None

    def num_tokens(self, row: TokenizedRow) -> int:
        """What of the row `footprint` runs at most."""
        padded = self.module.layout.name == "padded"
        return computed_tokens(self._batch(row, self._length(row)), padded=padded)

    def footprint(self, row: TokenizedRow) -> Footprint:
        """Measured on the row's texts and on their first halves."""
        padded = self.module.layout.name == "padded"
        most = self._length(row)
        whole, half = self._batch(row, most), self._batch(row, most // 2)
        self.module.train()
        with _untouched(self.module, self.device):
            if self.device.type == "cuda":
                self._run(half)  # The libraries' workspaces, taken once, are no token's.
            peaks = [peak_bytes(partial(self._run, batch), self.device) for batch in (half, whole)]
            pools = not padded and self.module.part is None
            per_mask_entry = self._per_mask_entry() if pools else 0.0
        tokens = [computed_tokens(batch, padded=padded) for batch in (half, whole)]
        per_token = (peaks[1] - peaks[0]) / max(1, tokens[1] - tokens[0])
        return Footprint(max(0.0, peaks[1] - per_token * tokens[1]), per_token, per_mask_entry)

    def _length(self, row: TokenizedRow) -> int:
        padded = self.module.layout.name == "padded"
        return max(row.lengths) if padded else min(_PROBE_LENGTH, max(row.lengths))

    def _per_mask_entry(self) -> float:
        """What the last layer's attention holds for each score and token, its mask included."""
        config = unwrapped(self.module.model).config.get_text_config()
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        if not isinstance(heads, int):  # models whose layers differ
            heads = groups = max(heads)
        size = (head_sizes(config) or (64, 64))[0]
        dtype = autocast_dtype(self.precision) or unwrapped(self.module.model).dtype

        def run() -> None:
            query, key, value = (
                torch.zeros(1, n, _MASK, size, dtype=dtype, device=self.device, requires_grad=True)
                for n in (heads, groups, groups)
            )
            mask = torch.ones(_MASK, _MASK, dtype=torch.bool, device=self.device)
            attended = Dense(mask).attend(query, key, value, None, softcap_of(config))
            torch.autograd.backward(attended.sum())

        return peak_bytes(run, self.device) / _MASK**2

    def _batch(self, row: TokenizedRow, length: int) -> PackedBatch:
        """The row's texts, each cut to `length` tokens."""
        texts = [ids[: max(1, length)] for ids in row.sequences]
        return pack_texts(texts, self.pad_token_id, share=self.module.layout.name == "shared")

    def _run(self, batch: PackedBatch) -> None:
        on_device = to_device(batch, self.device, self.module.path)
        torch.autograd.backward(in_precision(self.module, on_device, self.precision).sum())


@contextlib.contextmanager
def _untouched(module: PackedScorer, device: torch.device) -> Iterator[None]:
    """Zeros as gradients, and what gradients and random states were before, afterwards.

    The input embedding gets none: its gradient, as large for one token as for thousands, would be the peak.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    before = [p.grad for p in trained]
    embedding = {id(p) for p in unwrapped(module.model).get_input_embeddings().parameters()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for parameter in trained:
                if id(parameter) in embedding:
                    parameter.requires_grad_(False)
                else:
                    parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.requires_grad_(True)
                parameter.grad = gradient


def checkpointed_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that are computed again in backward."""
    # On transformers' layers the flag stands on each; older models read it on the decoder that runs them.
    return [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]


@contextlib.contextmanager
def without_checkpointing(layers: list[torch.nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
