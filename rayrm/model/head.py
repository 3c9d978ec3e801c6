"""The reward head in the precision of its weights, whatever the autocast.

A bf16 product would round scores to 8 bits: the two sides of a pair, whose difference is the loss, often to
the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayrm.model.layout import unwrapped
from rayrm.model.replaced_forward import replace_forward


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
