"""A host array on a device, without the host waiting for the copy.

A GPU copies asynchronously only from pinned memory; torch keeps the pinned block until the copy is done, and
gives it to the next one.
"""

from __future__ import annotations

from typing import Any

import torch


def copied(array: Any, device: torch.device) -> torch.Tensor:
    """A numpy array, list or CPU tensor as a tensor on `device`."""
    host = torch.as_tensor(array)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
