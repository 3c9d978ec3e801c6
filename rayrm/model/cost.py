"""What a model's attention costs beside its linear layers, as planning wants to know it."""

from __future__ import annotations

import torch

from rayrm.data.planning import attention_weight
from rayrm.model.layout import unwrapped


def attention_weight_of(model: torch.nn.Module) -> float:
    """The cost of one (query, key) pair in tokens; 0 where the config does not say how wide attention is.

    Read before an engine takes the model: a sharded parameter does not tell its size.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    # Models whose layers differ give lists.
    if not isinstance(heads, int) or not isinstance(layers, int):
        return 0.0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return attention_weight(heads * head_size, layers, inner.num_parameters(exclude_embeddings=True))
