"""Whether bf16 is worth using on this machine: a fact of its hardware, so the same answer every time.

GPUs: what CUDA reports, without emulation. CPUs: only with bf16 instructions. Measured on one core of an EPYC
with avx512_bf16, a training step of an MLP under autocast: fp32 1.35 s, bf16 0.68 s; with those instructions
off (`ONEDNN_MAX_CPU_ISA=AVX2`) bf16 takes 20.4 s, which is why "bf16 runs" is not "bf16 is usable".
"""

from __future__ import annotations

import torch


def bf16_usable(*, use_cpu: bool = False) -> tuple[bool, str]:
    """Whether training in bf16 is faster than in fp32 here, and the fact that decides it, as a phrase.

    Args:
        use_cpu: ask about the CPU even where there is a GPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"{name} has bf16 units"
        return False, f"{name} has no bf16 units"
    instructions = _cpu_bf16_instructions()
    if not instructions:
        return False, "this CPU has no bf16 instructions (avx512_bf16 or amx_bf16)"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, f"this CPU has {instructions}, but oneDNN may not use it (see ONEDNN_MAX_CPU_ISA)"
    return True, f"this CPU has {instructions}"


def _cpu_bf16_instructions() -> str:
    """The CPU's bf16 matrix instructions, or an empty string."""
    # Every CPU with AMX tiles multiplies bf16 in them.
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""
