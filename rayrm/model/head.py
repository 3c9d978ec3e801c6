"""The reward head: which modules it is made of, and its product in their weights' precision.

A bf16 product would round scores to 8 bits: the two sides of a pair, whose difference is the loss, often to
the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayrm.model.layout import unwrapped
from rayrm.model.replaced_forward import replace_forward

# `pooler`: a classifier that has one takes it; RoBERTa's does not. ModernBERT has `decoder.*`.
_PREDICTORS = ("lm_head", "embed_out", "cls", "lm_predictions", "mask_predictions", "pooler")


def head_parts(model: torch.nn.Module) -> list[str]:
    """The names of all that turns the base model's result into a score, as `modules_to_save` takes them.

    Usually `score` or `classifier` alone. DeBERTa has a `pooler` before it, ModernBERT a `head`, which their
    base models lack; BERT's pooler is in its base model, and missing from what was a language model.
    Empty for a model that has no base model inside.
    """
    inner = unwrapped(model)
    body = inner.base_model
    if body is inner:
        return []
    parts = [name for name, child in inner.named_children() if child is not body and _has_weights(child)]
    pools = _has_weights(getattr(body, "pooler", None)) and "pooler" not in parts
    return [*parts, "pooler"] if pools else parts


def is_of_head(model: torch.nn.Module, key: str) -> bool:
    """Whether a weight is one of `head_parts`: drawn at random where a checkpoint lacks it."""
    parts = key.split(".")
    if parts[0] == unwrapped(model).base_model_prefix:
        return "pooler" in parts[1:2]
    return parts[0] in head_parts(model)


def is_of_language_model(key: str) -> bool:
    """Whether a checkpoint's weight only predicts tokens, or pools for that: a reward model drops it."""
    return key.split(".", 1)[0] in _PREDICTORS or key in ("decoder.weight", "decoder.bias")


def _has_weights(module: torch.nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def exact_head(model: torch.nn.Module) -> Callable[[], None]:
    """Let the layers that give the score compute outside of autocast; returns what undoes it.

    They are those with one output that are no part of the base model, be they called `score`, `classifier` or
    `classifier.out_proj`; an adapter on one, and the copy of it that an adapter trains, are such layers too.
    """
    inner = unwrapped(model)
    body = set(inner.base_model.modules())
    heads = [m for m in inner.modules() if m not in body and getattr(m, "out_features", None) == 1]
    undos = [_replace(head) for head in heads]

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


def _replace(head: Any) -> Callable[[], None]:
    original = head.forward

    def forward(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return original(hidden.to(head.weight.dtype), *rest, **options)

    return replace_forward(head, forward)
