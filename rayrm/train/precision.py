"""The precision a run computes in: what its config asks for, where the hardware can.

Mixed precision is autocast over float32 parameters. Decided once, by all ranks together.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.model.forward import DeviceBatch, PackedScorer
from rayrm.model.precision import bf16_usable

logger = logging.getLogger("rayrm.train")
Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(config: RewardConfig, device: torch.device) -> Precision:
    """fp16 needs a GPU; bf16 without usable bf16 on every rank becomes fp32, with a log line."""
    if config.fp16:
        if device.type == "cpu":
            raise ConfigError("`fp16` (True) needs a GPU. Set `fp16=false`, and `bf16=false` for fp32.")
        return "fp16"
    if not config.bf16:
        return "fp32"
    usable, why = bf16_usable(use_cpu=device.type == "cpu")
    if dist.is_initialized() and dist.get_world_size() > 1:
        agreed = torch.tensor(int(usable), device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        usable = bool(agreed.item())
    if not usable:
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("bf16 is not used, training is in fp32: %s", why)
        return "fp32"
    return "bf16"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What autocast computes in; None without autocast."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def in_precision(module: PackedScorer, batch: DeviceBatch, precision: Precision) -> torch.Tensor:
    """One forward, under autocast where the precision asks for it. Scores `[N]`, float32."""
    dtype = autocast_dtype(precision)
    with torch.autocast(batch.ids.device.type, dtype=dtype, enabled=dtype is not None):
        scores: torch.Tensor = module(batch)
    return scores
