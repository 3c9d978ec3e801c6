"""Host memory that is used again from one checkpoint to the next: new pages would cost more than the copy.

A copy costs as much memory as the state it holds, from the first checkpoint to the end of the run.
"""

from __future__ import annotations

import torch


class HostMemory:
    """Copies of tensors, by key. `begin` starts the next set, which overwrites the one before."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._fresh: set[str] = set()
        self._devices: set[torch.device] = set()

    def begin(self) -> None:
        self._fresh.clear()

    def hold(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A flat copy on the host. A key is copied once in a set: who asks again gets the same copy."""
        if key in self._fresh:
            return self._kept[key]
        flat = tensor.detach().reshape(-1)
        kept = self._kept.get(key)
        if kept is None or kept.shape != flat.shape or kept.dtype != flat.dtype:
            kept = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
            self._kept[key] = kept
        kept.copy_(flat, non_blocking=flat.is_cuda)
        if flat.is_cuda:
            self._devices.add(flat.device)
        self._fresh.add(key)
        return kept

    def settle(self) -> None:
        """Wait for the copies that devices still make."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
