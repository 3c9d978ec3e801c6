"""fp16's loss scale: gradients are those of the loss times it, so that small ones do not vanish in 16 bits.

The schedule, and the words of its state, are those of `torch.amp.GradScaler`: halved where gradients
overflow, whose step is left out; doubled after 2,000 steps without. GradScaler itself divides one optimizer's
own gradients, and DeepSpeed 0.19 leaves it to do so after clipping. Here every engine divides by `scale`
before it measures and clips, and decides by the norm it measured, which is the same on all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_GROWTH = 2.0
_BACKOFF = 0.5
_INTERVAL = 2000
_MOST = 2.0**127
"""A float32 would be infinite beyond."""
_LEAST = 0.5
"""Gradients that overflow even so are no matter of the scale."""


@dataclass(slots=True)
class LossScale:
    """`scale` is a power of two: multiplying and dividing by it rounds nothing."""

    scale: float = 2.0**16
    num_sound: int = 0
    """Steps without overflow since the scale was changed."""

    def update(self, norm: float) -> bool:
        """Follow a step whose gradient norm was `norm`; False where it overflowed and must be left out."""
        if not math.isfinite(norm):
            self.scale = max(self.scale * _BACKOFF, _LEAST)
            self.num_sound = 0
            return False
        self.num_sound += 1
        if self.num_sound == _INTERVAL:
            self.scale = min(self.scale * _GROWTH, _MOST)
            self.num_sound = 0
        return True

    @property
    def is_spent(self) -> bool:
        """Whether gradients overflowed though the loss was not enlarged: a smaller scale would not help."""
        return self.scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": _INTERVAL,
            "_growth_tracker": self.num_sound,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.num_sound = float(state["scale"]), int(state["_growth_tracker"])
