"""Rotary positions on a CPU in float32: three operations over queries and keys, forward and backward each.

transformers writes a rotation as two products, a sum, and halves that are negated, joined and, in backward,
cut out of zeros: a dozen passes over memory where three do, 3% of a small model's step. Its modelling files
call the function by a name in their module, so it is replaced there, for as long as a model that was loaded
from that file asks for it, and only where it computes what ours computes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from rayrm.model.rms_norm import is_cpu_float32

_NAME = "apply_rotary_pos_emb"
_users: Counter[ModuleType] = Counter()


def fuse_rope(model: torch.nn.Module) -> Callable[[], None]:
    """Let the modelling file of a float32 CPU model rotate by our function; returns what undoes it.

    Calls on another device, in another precision or with other shapes stay the file's own.
    """
    parameter = next(model.parameters())
    if not is_cpu_float32(parameter):
        return lambda: None
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    taken = [file for file in files if _users[file] or _replace(file)]
    _users.update(taken)

    def undo() -> None:
        for file in taken:
            _users[file] -= 1
            if not _users[file]:
                rotate = getattr(file, _NAME)
                setattr(file, _NAME, rotate.original)

    return undo


def _replace(file: ModuleType) -> bool:
    original: Any = getattr(file, _NAME, None)
    if original is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        theirs = original(query, key, cos, sin)
    except (RuntimeError, TypeError):
        return False  # other shapes, or more to say
    for one, other in zip(theirs, (query, key), strict=True):
        if not torch.allclose(one, _Rotate.apply(other, cos[:, None], sin[:, None]), rtol=1e-5, atol=1e-6):  # type: ignore[no-untyped-call]
            return False

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rest or options or not is_cpu_float32(q) or q.shape[-1] != cos.shape[-1] or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *rest, **options)  # type: ignore[no-any-return]
        cos, sin = cos[:, None], sin[:, None]
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    rotate.original = original  # type: ignore[attr-defined]
    setattr(file, _NAME, rotate)
    return True


class _Rotate(torch.autograd.Function):
    """`[B, H, T, D]` turned by the angles of `cos`, `sin` `[B, 1, T, D]`: https://arxiv.org/abs/2104.09864.

    The two halves of the last dimension are a rotation's two coordinates, and the halves of `cos` and `sin`
    are equal.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """Back (`direction` -1) by the angles that it was turned forth."""
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., half:], value=-direction)
    turned[..., half:].addcmul_(states[..., :half], sin[..., :half], value=direction)
    return turned
