"""`[rl]` -> TRL's config, and what must hold before a worker is started.

TRL's configs look at the hardware and the number of ranks of the process that builds them, so the driver
builds one that stands for all ranks together, and each rank its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

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
_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size")
_OF_GROUPS = (*_BATCHES, "gradient_accumulation_steps", "num_generations")
_Bound = tuple[str, Callable[[float], bool]]
_COUNT: _Bound = ("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE: _Bound = ("at least 0", lambda value: value >= 0)
_POSITIVE: _Bound = ("above 0", lambda value: value > 0)
_SHARE: _Bound = ("from 0 to 1", lambda value: 0 <= value <= 1)
_POSITIVE_SHARE: _Bound = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_DECAY: _Bound = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_SEED: _Bound = ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
_BOUNDS: dict[str, _Bound] = {
    "max_steps": (
        "at least 1, or -1 to train for `num_train_epochs`",
        lambda value: value >= 1 or value == -1,
    ),
    "num_generations": ("at least 2: an advantage compares answers", lambda value: value >= 2),
    "num_train_epochs": _POSITIVE,
    "max_completion_length": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_generation": _COUNT,
    "generation_batch_size": _COUNT,
    "num_iterations": _COUNT,
    "ref_model_sync_steps": _COUNT,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "top_p": _POSITIVE_SHARE,
    "top_k": _NOT_NEGATIVE,
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "beta": _NOT_NEGATIVE,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _POSITIVE,
    "ref_model_mixup_alpha": _SHARE,
    "top_entropy_quantile": _SHARE,
    "off_policy_mask_threshold": _POSITIVE,
    "sapo_temperature_neg": _POSITIVE,
    "sapo_temperature_pos": _POSITIVE,
}
"""What a number of `[rl]` must be, as TRL 1.16 documents its fields; its configs check few of them."""
_WITHOUT_BOUND = ("max_grad_norm", "vllm_importance_sampling_clip_max")
"""Of these infinity says that there is no bound, as None does, which a file cannot say."""
_OF_HARDWARE = ("bf16", "fp16", "tf32", "deepspeed", "fsdp", "fsdp_config", "use_cpu", "torch_compile")


def trainer_config(run: RLRun, num_heldout: int) -> Any:
    """The config of this rank, with defaults of ours: a log of every step, no tracker, no checkpoints.

    `num_heldout`: prompts that are answered before and after. Raises ConfigError for what TRL refuses.
    """
    return _built(run, {**_defaults(run, num_heldout), **_precision(run), **run.trainer})


def check_trainer(run: RLRun, num_prompts: int, num_heldout: int) -> None:
    """Raise ConfigError for a field that TRL's config does not have or that is ours, a value that it cannot
    train with, a step that is no whole number of prompts, or fewer prompts than a step takes."""
    kind = _kind(run)
    known = {one.name: one for one in dataclasses.fields(kind)}
    for name, value in run.trainer.items():
        if name not in known:
            raise ConfigError(f"`rl.{name}` is no field of {kind.__name__}.{nearest(name, known)}")
        if name in _OURS and value not in (False, None, "no"):
            raise ConfigError(f"`rl.{name}` ({value!r}) is for this run to say. {_OURS[name]}; delete it.")
        _check_value(name, value, _types_of(known[name].type))
    fields = {**_defaults(run, num_heldout), **run.trainer}
    for name in _OF_GROUPS:
        if fields.get(name) is None:
            fields[name] = known[name].default
    samples = run.prompts.samples_per_prompt
    if num_heldout and fields["per_device_eval_batch_size"] % samples:
        raise ConfigError(
            f"`rl.per_device_eval_batch_size` ({fields['per_device_eval_batch_size']}) must be a multiple of "
            f"`prompts.samples_per_prompt` ({samples})."
        )
    _check_groups(fields, run.cluster.num_workers)
    num_ranks = max(1, run.cluster.num_workers)
    for name in _BATCHES:
        fields[name] *= num_ranks
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


def check_policy(name: str, prompts: Iterable[Mapping[str, Any]] = ()) -> None:
    """Raise ModelError unless `name` is a causal language model whose tokenizer can render the prompts.

    Reads its config and its tokenizer alone. `prompts`: rows with a `prompt`, trained on or held out; message
    lists need a chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelError(f"`policy.name` ({name!r}) does not exist. Type a directory or a hub name.")
    config = _read(AutoConfig, name, "model")
    built = config.architectures or []
    if built and not any(one.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for one in built):
        raise ModelError(
            f"`policy.name` ({name!r}) holds {', '.join(built)}, which cannot write. A policy is a causal "
            "language model: type its directory, or a hub name."
        )
    template = getattr(_read(AutoTokenizer, name, "tokenizer"), "chat_template", None)
    if isinstance(template, dict):  # several by name: the trainer renders with this one
        template = template.get("default")
    if not template and any(not isinstance(row["prompt"], str) for row in prompts):
        raise ModelError(
            f"the tokenizer of `policy.name` ({name!r}) has no `chat_template`, and prompts are message "
            "lists, which only a template makes a text. Type policy.name=MODEL, a model for chat, or the "
            "directory that `python jobs/prepare_model.py DIRECTORY` makes; or give strings as prompts."
        )


def _read(loader: Any, name: str, what: str) -> Any:
    try:
        return loader.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"`policy.name` ({name!r}) is no {what} that can be loaded ({said.rstrip(' .:')}). Type the "
            "directory of a causal language model and its tokenizer, or a hub name."
        ) from error


def _types_of(annotation: Any) -> set[Any]:
    """The types of a field that may be None: of `int | None` it is {int}."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return set(get_args(annotation) if is_union else (annotation,)) - {NoneType}


def _check_value(name: str, value: Any, kinds: set[Any]) -> None:
    """Refuse what is no number where `kinds`, the field's types, want one, and a number out of bounds."""
    shown = f"`rl.{name}` ({value!r})"
    if value is None:
        return
    if not _is_finite(value) and not (name in _WITHOUT_BOUND and value == math.inf):
        raise ConfigError(f"{shown} must be finite. Type a number.")
    if kinds == {bool} and isinstance(value, str):
        raise ConfigError(f"{shown} must be true or false.")
    if (name in _BOUNDS or kinds <= {int, float}) and (
        isinstance(value, bool) or not isinstance(value, int | float)
    ):
        raise ConfigError(f"{shown} must be a number.")
    if kinds == {int} and isinstance(value, float):
        raise ConfigError(f"{shown} must be a whole number, without a decimal point.")
    if name in _BOUNDS and not _BOUNDS[name][1](value):
        raise ConfigError(f"{shown} must be {_BOUNDS[name][0]}.")


def _is_finite(value: Any) -> bool:
    """Whether no number of a value, or of the lists and tables that it holds, is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_is_finite(one) for one in value.values())
    return not isinstance(value, list | tuple) or all(_is_finite(one) for one in value)


def _check_groups(fields: Mapping[str, Any], num_workers: int) -> None:
    """Refuse a step that is no whole number of prompts, each with `num_generations` answers.

    `fields`: as one rank has them; `generation_batch_size` alone counts the answers of all ranks.
    """
    each, group = fields["per_device_train_batch_size"], fields["num_generations"]
    num_ranks = max(1, num_workers)
    ranks = f" x `cluster.num_workers` ({num_workers})" if num_workers else ""
    per_device = f"`per_device_train_batch_size` ({each}){ranks}"
    whole = fields.get("generation_batch_size")
    if whole is not None:
        unit = math.lcm(each * num_ranks, group)
        if fields.get("steps_per_generation") is None and whole % unit:
            raise ConfigError(
                f"`rl.generation_batch_size` ({whole}) must be a multiple of {per_device} and of "
                f"`num_generations` ({group}). Type generation_batch_size={_multiples(whole, unit)}."
            )
        return  # TRL refuses both
    counted = "steps_per_generation"
    if fields.get(counted) is None:
        counted = "gradient_accumulation_steps"
    steps = fields[counted]
    total = each * steps * num_ranks
    if total % group == 0:
        return
    fitting = {
        "num_generations": _divisors(group, total),
        "per_device_train_batch_size": _multiples(each, group // math.gcd(group, steps * num_ranks)),
        counted: _multiples(steps, group // math.gcd(group, each * num_ranks)),
    }
    words = [f"{name}={values}" for name, values in fitting.items() if values]
    raise ConfigError(
        f"`rl.num_generations` ({group}) must divide the answers of a step, {per_device} x `{counted}` "
        f"({steps}) = {total}: a prompt's answers are compared with each other. Type "
        f"{', '.join(words[:-1])} or {words[-1]}."
    )


def _multiples(value: int, unit: int) -> str:
    """The multiples of `unit` nearest to a value that is none, below and above."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _divisors(value: int, total: int) -> str:
    """The divisors of `total`, 2 or more, nearest to a value that is none, below and above."""
    small = [one for one in range(1, math.isqrt(total) + 1) if total % one == 0]
    fit = sorted({one for small_one in small for one in (small_one, total // small_one)} - {1})
    near = [*[one for one in fit if one < value][-1:], *[one for one in fit if one > value][:1]]
    return " or ".join(map(str, near))


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
