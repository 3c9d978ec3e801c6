"""A module's own `forward` replaced for a while, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let `module` compute by `forward`; returns what undoes it.

    A `forward` that another library had set on the instance (accelerate's hooks do) stands there again; one
    that was set over ours stays.
    """
    own = vars(module)
    before = own.get("forward")

    def undo() -> None:
        if own.get("forward") is not forward:
            return
        if before is None:
            del module.forward
        else:
            module.forward = before

    module.forward = forward
    return undo
