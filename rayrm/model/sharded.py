"""Parameters of which this rank holds a part: DeepSpeed leaves them empty, and notes what they are."""

from __future__ import annotations

import torch


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its parts are."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")
