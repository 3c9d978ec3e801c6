"""What DeepSpeed is told: a run's settings, joined with the user's own DeepSpeed file. Imports no deepspeed.

What a user's file says is honoured or refused: "auto" and what is absent follow RewardConfig, what agrees
with it is kept, and what contradicts it is an error that names both.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train.precision import Precision

logger = logging.getLogger("rayrm.train")


def zero_stage_of(config: RewardConfig) -> int | None:
    """The ZeRO stage that `zero_stage` or the user's DeepSpeed file chooses; None without DeepSpeed."""
    if config.deepspeed is None:
        return config.zero_stage
    return _stage(_without_auto(_read(config.deepspeed)))


def deepspeed_config(config: RewardConfig, precision: Precision, num_ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's own (`deepspeed`), or a stage (`zero_stage`).

    Raises:
        ConfigError: the user's file contradicts RewardConfig.
    """
    chosen: dict[str, Any] = {"zero_optimization": {"stage": config.zero_stage or 0}}
    if config.deepspeed is not None:
        chosen = _without_auto(_read(config.deepspeed))
        _check(chosen, config, num_ranks)
    stage = _stage(chosen)
    zero = {**chosen.get("zero_optimization", {}), "stage": stage}
    if zero.get("overlap_comm"):
        logger.warning(
            "`deepspeed`: `zero_optimization.overlap_comm` (true) is set to false: it needs DeepSpeed to "
            "manage accumulation, and here the number of micro-batches varies"
        )
    # Overlapped communication is for managed accumulation.
    chosen["zero_optimization"] = {**zero, "overlap_comm": False} if stage > 0 else zero
    for key in ("train_batch_size", "bf16", "fp16"):
        chosen.pop(key, None)
    chosen.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        zero_allow_untested_optimizer=True,
        steps_per_print=None,
        # Stage 0 clips in an optimizer hook, where the norm before clipping can be had.
        gradient_clipping=config.max_grad_norm if stage > 0 else 0.0,
    )
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        chosen["torch_autocast"] = {"enabled": True, "dtype": dtype}
        chosen["data_types"] = {"grad_accum_dtype": "fp32"}
    return chosen


def _check(chosen: dict[str, Any], config: RewardConfig, num_ranks: int) -> None:
    """Refuse what the run could not honour; all of it at once."""
    problems = [
        f"`deepspeed` has a section `{section}`, which {setting}. Delete it."
        for section, setting in (
            ("optimizer", "`optim`, `learning_rate` and `optim_args` say"),
            ("scheduler", "`lr_scheduler_type` and `warmup_steps` say"),
            ("torch_autocast", "`bf16` and `fp16` say"),
            ("data_types", "`bf16` and `fp16` say: gradients are float32"),
            ("managed_gradient_accumulation", "the token budget's plan says"),
        )
        if section in chosen
    ]
    rows = config.per_device_train_batch_size
    accumulated = config.gradient_accumulation_steps
    ours: list[tuple[str, Any, str]] = [
        ("train_micro_batch_size_per_gpu", rows, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", accumulated, "gradient_accumulation_steps"),
        (
            "train_batch_size",
            rows * accumulated * num_ranks,
            "per_device_train_batch_size x gradient_accumulation_steps x workers",
        ),
        ("gradient_clipping", config.max_grad_norm, "max_grad_norm"),
        ("bf16.enabled", bool(config.bf16), "bf16"),
        ("fp16.enabled", bool(config.fp16), "fp16"),
    ]
    for key, value, setting in ours:
        section, _, name = key.rpartition(".")
        told = (chosen.get(section, {}) if section else chosen).get(name, value)
        if told != value:
            problems.append(
                f"`deepspeed` says `{key}` ({told}), RewardConfig `{setting}` ({value}). "
                f'Make them equal, or write "auto" for `{key}`.'
            )
    for section in ("bf16", "fp16"):
        if more := sorted(set(chosen.get(section, {})) - {"enabled"}):
            problems.append(
                f"`deepspeed` says `{section}.{more[0]}`, which nothing here reads: mixed precision is "
                "autocast over float32 weights. Delete it."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _stage(chosen: dict[str, Any]) -> int:
    return int(chosen.get("zero_optimization", {}).get("stage", 0))


def _read(deepspeed: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(deepspeed, dict):
        return dict(deepspeed)
    file = Path(deepspeed)
    if not file.is_file():
        raise ConfigError(
            f"`deepspeed` ({deepspeed}) is not a file. Pass a DeepSpeed JSON file, or `zero_stage`."
        )
    try:
        read = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"`deepspeed` ({deepspeed}) is not valid JSON: {error}.") from error
    return dict(read)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }
