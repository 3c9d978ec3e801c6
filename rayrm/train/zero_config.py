"""The DeepSpeed configuration of a run: the user's own or a stage, with what it leaves out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from pydantic import ValidationError

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import (
    check_batch_size,
    check_partition,
    read_deepspeed,
    resolved_stage,
    without_effect,
)
from rayrm.errors import ConfigError
from rayrm.settings import readable
from rayrm.train.build import on_first_rank
from rayrm.train.nvme import in_own_folders
from rayrm.train.precision import Precision

logger = logging.getLogger("rayrm.train")
# Rows per step are counted by the caller; mixed precision is autocast; optimizer and schedule are torch's.
# Groups of ranks are ours too: DeepSpeed averages over all ranks.
_OURS = (
    "train_batch_size", "bf16", "bfloat16", "fp16", "amp", "optimizer", "scheduler",
    "sequence_parallel_size", "data_parallel_size",
)  # fmt: skip
_PREFIX: Final = "stage3_"
_MOST_LIVE: Final = 10**9
_SHARE_LIVE: Final = 8


def deepspeed_config(config: RewardConfig, precision: Precision, num_workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's own (`deepspeed`), or a stage (`zero_stage`).

    What a user's file leaves out or has as "auto" is the run's. What it has and the run cannot heed is told.
    """
    chosen: dict[str, Any] = {} if config.deepspeed is None else read_deepspeed(config.deepspeed)
    check_batch_size(chosen, config, num_workers)
    check_partition(chosen, num_workers)
    for ignored in without_effect(chosen, config, autocast=precision != "fp32"):
        if on_first_rank():
            logger.warning("%s", ignored)
    stage = resolved_stage(config) or 0
    for key in _OURS:
        chosen.pop(key, None)
    chosen.update(
        zero_optimization={**chosen.get("zero_optimization", {}), "stage": stage},
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        zero_allow_untested_optimizer=True,
        # Offloaded or not, the optimizer is torch's, whose AdamW has a fused kernel for CPUs too.
        zero_force_ds_cpu_optimizer=False,
        # Stage 0 clips in an optimizer hook, where the norm before clipping can be had.
        gradient_clipping=config.max_grad_norm if stage > 0 else 0.0,
    )
    chosen.setdefault("steps_per_print", None)
    if stage > 0:
        # Overlapped communication is for managed accumulation.
        chosen["zero_optimization"]["overlap_comm"] = False
    chosen["zero_optimization"] = in_own_folders(chosen["zero_optimization"])
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        # Without the empty list, the gradients of linear layers would be averaged in that precision.
        chosen["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
        chosen["data_types"] = {**chosen.get("data_types", {}), "grad_accum_dtype": "fp32"}
    return chosen


def with_sizes(zero: Mapping[str, Any], model: torch.nn.Module, hidden_size: int) -> dict[str, Any]:
    """The section `zero_optimization` of stage 3, with what it leaves out.

    Of the weights an eighth, and 1e9 at most (DeepSpeed's default, an eighth of 8e9), is live at once or
    stays until it is used again; the buckets and what is never parted are as transformers resolves "auto":
    h^2 for gradients, 0.9 h^2 for prefetching, 10 h (`integrations/deepspeed.py`). What one layer needs is
    gathered whatever these say.
    """
    whole = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
    live = min(_MOST_LIVE, max(1, whole // _SHARE_LIVE))
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }
    # DeepSpeed takes each with and without its prefix.
    left_out = {
        name: size
        for name, size in sizes.items()
        if name not in zero and name.removeprefix(_PREFIX) not in zero
    }
    return {**zero, **left_out}


@contextlib.contextmanager
def refusals_named() -> Iterator[None]:
    """What DeepSpeed refuses of its configuration within the block is an error of `deepspeed`."""
    try:
        yield
    except ValidationError as problems:
        raise ConfigError(f"`deepspeed` is refused by DeepSpeed: {readable(problems, dict)}") from problems
