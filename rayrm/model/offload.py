"""Activations kept in the host's memory between forward and backward.

What autograd saves in a forward is copied to (pinned) host memory, and back when the backward asks for it, in
the order of the device's own stream: values are the same bits. Parameters stay where they are, and so does
what is small. It costs two copies of each saved activation over the bus; lowering the token budget or
recomputing (`gradient_checkpointing`, whose saved inputs are moved too) costs computing instead. As
`OffloadActivations` of torchtune and TRL (1.16, `trl/models/activation_offloading.py`), on one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayrm.model.replaced_forward import replace_forward

_LEAST_BYTES = 1024
"""Smaller tensors take longer to move than they save."""


@dataclass(frozen=True, slots=True)
class _Away:
    """A saved tensor's values on the host, and the device where they are needed."""

    values: torch.Tensor
    device: torch.device


def offload_activations(module: torch.nn.Module) -> Callable[[], None]:
    """Let the forward of `module` save what its backward needs on the host; returns what undoes it.

    Forwards without gradients are left alone.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor | _Away:
            # The weights that ZeRO-3 gathers for a forward lie elsewhere than before it: known by their base.
            base = tensor if tensor._base is None else tensor._base
            if (
                isinstance(base, torch.nn.Parameter)
                or tensor.numel() * tensor.element_size() < _LEAST_BYTES
                or tensor.untyped_storage().data_ptr() in weights
            ):
                return tensor
            return _Away(_on_host(tensor), tensor.device)

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return original(*args, **kwargs)

    return replace_forward(module, forward)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    pinned = tensor.device.type == "cuda"
    values = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return values.copy_(tensor.detach(), non_blocking=pinned)


def _unpack(saved: torch.Tensor | _Away) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    return saved.values.to(saved.device, non_blocking=True)
