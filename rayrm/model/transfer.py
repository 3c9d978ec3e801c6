"""Host arrays -> tensors on a device, without waiting for it."""

from __future__ import annotations

import torch


def on_device(array: object, device: torch.device) -> torch.Tensor:
    """A numpy array, tensor or list of numbers on `device`.

    A GPU reads pinned memory by itself; from other memory the copy would make the host wait.
    """
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
