"""How much memory a device has left, and the most that a computation holds at a time.

A GPU's driver and torch's allocator know both. On the CPU the system tells what is left, and what is held is
counted tensor by tensor as torch makes and drops them: the same number on every machine, without what a
kernel takes for itself while it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayrm.train.system_memory import available_memory, resident_memory


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still have on `device`; None where the system does not tell."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def held_bytes(device: torch.device) -> int | None:
    """What this process holds: on a GPU the most that torch had so far, on the CPU what is resident now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_memory()


def peak_bytes(compute: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors made by `compute` hold at a time, on `device`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    counted = _LiveTensors()
    with counted:
        compute()
    return counted.peak


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, from the operation that makes one to its end.

    A storage that an operation is given, and that none has made, was there before and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._note(given, made=False)
        result = func(*args, **(kwargs or {}))
        for given in tree_leaves(result):
            self._note(given, made=True)
        self.peak = max(self.peak, self._live)
        return result

    def _note(self, value: Any, *, made: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        for tensor in _dense_parts(value):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes() if made else 0
            self._known.add(key)
            self._live += size
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What holds a tensor's memory: itself, or the places and values of a sparse one."""
    if tensor.layout == torch.strided:
        return [tensor]
    return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else []
