"""The last decoder layer, computed only where a score is read.

A score is read at one token, so after the last layer's attention no other token matters: its keys and values
are needed of every token, its queries, output projection and MLP of the pooled tokens alone. Scores and
gradients are the same; of L layers nearly one is saved (6 layers: 15% of a step, 24 layers: 4%).

The layer's own code runs twice, so that any architecture's norms, biases and residuals hold: once on all
tokens until its attention has keys and values (`_KeysKnown` stops it there), once on the pooled rows, whose
queries then meet those keys. That layer is not checkpointed: it stores little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayrm.model.attention import Attention, Dense
from rayrm.model.replaced_forward import replace_forward

# What decoders hand their layers for each token; [1, T, ...] tensors, or tuples of them.
_BY_TOKEN = ("position_embeddings", "position_ids", "cache_position")


@dataclass(frozen=True, slots=True)
class PooledAttention:
    """A batch's attention; the last layer is wanted of the tokens `pooled` `[N]`, which see `at_pooled`."""

    all_tokens: Attention
    pooled: torch.Tensor
    at_pooled: Dense

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """As the attention of all tokens: every layer but the last asks for it."""
        return self.all_tokens.attend(query, key, value, scaling, softcap)


class _KeysKnown(Exception):
    """Ends the first pass through the layer; not an error."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value


class _StopAtKeys:
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        raise _KeysKnown(key, value)


@dataclass(frozen=True, slots=True)
class _PooledQueries:
    """Queries of the pooled rows; the rows' own keys give way to those of all tokens."""

    key: torch.Tensor
    value: torch.Tensor
    attention: Dense

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        return self.attention.attend(query, self.key, self.value, scaling, softcap)


def pool_last_layer(decoder: torch.nn.Module) -> Callable[[], None]:
    """Let `decoder`'s last layer give only the pooled rows where it is called with a `PooledAttention`.

    `decoder.layers` are its layers. Returns what undoes it.
    """
    layer: Any = decoder.layers[-1]  # type: ignore[index]
    whole = layer.forward
    checkpointed = getattr(layer, "gradient_checkpointing", None)

    def forward(hidden_states: torch.Tensor, *, forest: Any = None, **kwargs: Any) -> Any:
        if not isinstance(forest, PooledAttention):
            return whole(hidden_states, forest=forest, **kwargs)
        try:
            whole(hidden_states, forest=_StopAtKeys(), **kwargs)
        except _KeysKnown as known:
            queries = _PooledQueries(known.key, known.value, forest.at_pooled)
        rows = forest.pooled
        at_rows = {
            name: _taken(value, rows) if name in _BY_TOKEN else value for name, value in kwargs.items()
        }
        return whole(hidden_states[:, rows], forest=queries, **at_rows)

    restore = replace_forward(layer, forward)

    def undo() -> None:
        restore()
        if checkpointed is not None:
            layer.gradient_checkpointing = checkpointed

    if checkpointed is not None:
        layer.gradient_checkpointing = False
    return undo


def _taken(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_taken(part, rows) for part in value)
    return value if value is None else value.index_select(-1 if value.ndim == 1 else 1, rows)
