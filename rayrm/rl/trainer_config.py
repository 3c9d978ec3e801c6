"""`[rl]` -> TRL's config, and what must hold before a worker is started.

TRL's configs look at the hardware and the number of ranks of the process that builds them, so the driver
builds one that stands for all ranks together, and each rank its own.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from rayrm.errors import ConfigError, ModelError
from rayrm.rl.settings import RLRun
from rayrm.settings import nearest

_EVAL_BATCH_PROMPTS = 8
_OURS = {
    "num_generations_eval": "Set `prompts.samples_per_prompt`",
    "resume_from_checkpoint": "The same command goes on from the last checkpoint of `output_dir` by itself",
    "eval_strategy": "Held-out prompts are answered before and after training (`prompts.heldout`)",
    "remove_unused_columns": "Columns of the prompts go to the reward",
    "dataloader_drop_last": "Every held-out prompt is answered",
}
"""Fields that a run decides itself, and what to type instead."""
_OF_HARDWARE = ("bf16", "fp16", "tf32", "deepspeed", "fsdp", "fsdp_config", "use_cpu", "torch_compile")


def trainer_config(run: RLRun, num_heldout: int) -> Any:
    """The config of this rank, with defaults of ours: a log of every step, no tracker, no checkpoints.

    `num_heldout`: prompts that are answered before and after. Raises ConfigError for what TRL refuses.
    """
    return _built(run, {**_defaults(run, num_heldout), **_precision(run), **run.trainer})


def check_trainer(run: RLRun, num_prompts: int, num_heldout: int) -> None:
    """Raise ConfigError for a field that TRL's config does not have or that is ours, a value that TRL refuses
    of all ranks together, or fewer prompts than a step takes."""
    kind = _kind(run)
    defaults = {one.name: one.default for one in dataclasses.fields(kind)}
    for name, value in run.trainer.items():
        if name not in defaults:
            raise ConfigError(f"`rl.{name}` is no field of {kind.__name__}.{nearest(name, defaults)}")
        if name in _OURS and value not in (False, None, "no"):
            raise ConfigError(f"`rl.{name}` ({value!r}) is for this run to say. {_OURS[name]}; delete it.")
        if isinstance(value, str) and isinstance(defaults[name], bool | int | float):
            raise ConfigError(f"`rl.{name}` ({value!r}) must be a number, or true or false.")
    fields = {**_defaults(run, num_heldout), **run.trainer}
    if run.trainer.get("max_completion_length", 1) < 1:
        raise ConfigError("`rl.max_completion_length` must be at least 1: an answer has tokens.")
    samples = run.prompts.samples_per_prompt
    if num_heldout and fields["per_device_eval_batch_size"] % samples:
        raise ConfigError(
            f"`rl.per_device_eval_batch_size` ({fields['per_device_eval_batch_size']}) must be a multiple of "
            f"`prompts.samples_per_prompt` ({samples})."
        )
    num_ranks = max(1, run.cluster.num_workers)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        fields[name] = fields.get(name, kind.__dataclass_fields__[name].default) * num_ranks
    kept = {name: value for name, value in fields.items() if name not in _OF_HARDWARE}
    config = _built(run, {**kept, "use_cpu": True, "bf16": False})
    prompts = config.generation_batch_size // config.num_generations
    if num_prompts < prompts:
        raise ConfigError(
            f"{num_prompts} prompts are fewer than the {prompts} that a step of {num_ranks} workers takes "
            f"(`generation_batch_size` {config.generation_batch_size}, `num_generations` "
            f"{config.num_generations}). Give more prompts, or lower `per_device_train_batch_size` "
            "or `cluster.num_workers`."
        )


def check_policy(name: str) -> None:
    """Raise ModelError unless `name` is a causal language model, by its config alone."""
    from transformers import AutoConfig

    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelError(f"`policy.name` ({name!r}) does not exist. Type a directory or a hub name.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(
            f"`policy.name` ({name!r}) is no model that can be loaded: {said} Type the directory of a causal "
            "language model, or a hub name."
        ) from error
    built = config.architectures or []
    if built and not any(one.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for one in built):
        raise ModelError(
            f"`policy.name` ({name!r}) holds {', '.join(built)}, which cannot write. A policy is a causal "
            "language model: type its directory, or a hub name."
        )


def _kind(run: RLRun) -> Any:
    from trl import GRPOConfig, RLOOConfig

    return {"grpo": GRPOConfig, "rloo": RLOOConfig}[run.algorithm]


def _built(run: RLRun, fields: dict[str, Any]) -> Any:
    try:
        return _kind(run)(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"[rl] is refused by TRL's {_kind(run).__name__}: {error}") from error


def _defaults(run: RLRun, num_heldout: int) -> dict[str, Any]:
    samples = run.prompts.samples_per_prompt
    prompts_each = math.ceil(num_heldout / max(1, run.cluster.num_workers))
    saves = any(name.startswith("save_") for name in run.trainer)
    return {
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **({} if saves else {"save_strategy": "no"}),
        "num_generations_eval": samples,
        "per_device_eval_batch_size": samples * max(1, min(_EVAL_BATCH_PROMPTS, prompts_each)),
        "ddp_find_unused_parameters": False,
    }


def _precision(run: RLRun) -> dict[str, Any]:
    """bf16 where the hardware computes it; else float32, on the CPU where there is no GPU."""
    may_use_gpu = run.cluster.use_gpu or run.cluster.num_workers == 0
    if not may_use_gpu or not torch.cuda.is_available():
        return {"use_cpu": True, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}
    return {"bf16": torch.cuda.is_bf16_supported() and not run.trainer.get("fp16")}
