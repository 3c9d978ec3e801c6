"""Which path computes a run's attention: a function of device, precision, heads, soft cap and torch.

So it is the same choice each time, and it is made once: when a run, an evaluation or a `RewardModel` begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayrm.model.attention import AttentionPath
from rayrm.model.attention_probe import softcap_of
from rayrm.model.cost import head_sizes
from rayrm.model.layout import unwrapped
from rayrm.model.tiled import Tiled

# What torch's flash kernels for CUDA take: Ampere or newer, heads of at most 256 in steps of 8.
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD = 256
_FLASH_STEP = 8
# FlexAttention takes no smaller head on a GPU.
_FLEX_HEAD = 16
_CAPPED = "the flash kernels have no soft cap"


@dataclass(frozen=True, slots=True)
class ChosenPath:
    """A path, and why it is the one. Printed it is a line for the log."""

    name: AttentionPath
    reason: str

    def __str__(self) -> str:
        return f"attention path: {self.name} ({self.reason})"


def choose_path(
    model: torch.nn.Module, device: torch.device, autocast: torch.dtype | None = None
) -> ChosenPath:
    """The path for `model` on `device`; it computes in `autocast`, or in its own dtype where that is None."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    sizes, capped = head_sizes(config), softcap_of(config) is not None
    if device.type == "cuda":
        return gpu_path(
            inner.dtype if autocast is None else autocast,
            sizes,
            capability=torch.cuda.get_device_capability(device),
            flash=torch.backends.cuda.is_flash_attention_available(),
            capped=capped,
        )
    if device.type != "cpu":
        return ChosenPath("loop", f"a device of type {device.type}")
    if capped:
        return ChosenPath("loop", _CAPPED)
    if not Tiled.available():
        return ChosenPath("loop", "this torch has no flash kernel for CPUs")
    if sizes is None or sizes[0] != sizes[1]:
        return ChosenPath("loop", "the CPU's flash kernel wants keys and values of one known size")
    return ChosenPath("tiled", "the CPU's flash kernel over tiles of queries")


def gpu_path(
    dtype: torch.dtype,
    sizes: tuple[int, int] | None,
    *,
    capability: tuple[int, int],
    flash: bool,
    capped: bool = False,
) -> ChosenPath:
    """The path on a CUDA device of this compute capability.

    `sizes`: those of a key's and a value's head, None where the config does not say; `flash`: whether torch
    was built with flash attention; `capped`: whether logits are soft-capped.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return ChosenPath(
            "loop", f"{str(dtype).removeprefix('torch.')}: the flash kernels take bf16 and fp16"
        )
    if capability < _FLASH_CAPABILITY:
        return ChosenPath("loop", "the GPU is older than the flash kernels")
    fits = sizes is not None and sizes[0] == sizes[1] <= _FLASH_HEAD and sizes[0] % _FLASH_STEP == 0
    if flash and fits and not capped:
        return ChosenPath("varlen", "torch's variable-length flash kernel")
    why = "the flash kernels do not take its heads" if flash else "torch was built without flash attention"
    why = _CAPPED if capped else why
    if sizes is None or min(sizes) < _FLEX_HEAD:
        return ChosenPath("loop", f"{why}, FlexAttention neither")
    return ChosenPath("flex", why)
