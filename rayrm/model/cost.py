"""What a model's attention costs beside its linear layers, as planning wants to know it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rayrm.data.planning import attention_weight
from rayrm.model.layout import unwrapped
from rayrm.model.sharded import is_sharded, whole_shape


def attention_weight_of(model: torch.nn.Module) -> float:
    """The cost of one (query, key) pair in tokens; 0 where the config does not say how wide attention is."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    sizes, layers = head_sizes(config), getattr(config, "num_hidden_layers", None)
    if sizes is None or not isinstance(layers, int):
        return 0.0
    # A dot product with the key, and a part of the weighted sum of values.
    width = config.num_attention_heads * sum(sizes) // 2
    return attention_weight(width, layers, _num_weights(inner))


def _num_weights(model: PreTrainedModel) -> int:
    """Those outside of embeddings."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return int(model.num_parameters(exclude_embeddings=True))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(whole_shape(p).numel() for p in model.parameters() if id(p) not in tables)


def head_sizes(config: Any) -> tuple[int, int] | None:
    """The size of a head's key and of its value; None where the config does not say one for all layers."""
    heads = getattr(config, "num_attention_heads", None)
    # Models whose layers differ give lists.
    if not isinstance(heads, int):
        return None
    rotated, latent = getattr(config, "qk_rope_head_dim", None), getattr(config, "qk_nope_head_dim", None)
    if rotated and latent:
        # Keys expanded from a latent, with a rotated part beside it.
        return rotated + latent, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size, size
