"""A user's own DeepSpeed configuration: its ZeRO stage, and what it may say beside a `RewardConfig`.

What both say must be equal, "auto" or absent in the file; so no setting of either is dropped. Knows neither
deepspeed nor torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rayrm.deepspeed_keys import KEYS, check_keys
from rayrm.deepspeed_sections import (
    QUANTIZED,
    at,
    check_offload,
    check_optimizer,
    check_scheduler,
    check_zero_plus_plus,
)
from rayrm.errors import ConfigError

if TYPE_CHECKING:
    from rayrm.config import RewardConfig

Table = dict[str, Any]

_SAME: Final = {
    ("gradient_clipping",): "max_grad_norm",
    ("gradient_accumulation_steps",): "gradient_accumulation_steps",
    ("train_micro_batch_size_per_gpu",): "per_device_train_batch_size",
    ("bf16", "enabled"): "bf16",
    ("bfloat16", "enabled"): "bf16",
    ("fp16", "enabled"): "fp16",
    ("sequence_parallel_size",): "sequence_parallel_size",
}
"""A key of DeepSpeed's -> the field that says it too."""
_ONLY: Final[dict[tuple[str, ...], tuple[Any, str]]] = {
    ("managed_gradient_accumulation",): (False, "the number of micro-batches varies from step to step"),
    ("zero_allow_untested_optimizer",): (True, "the optimizer is torch's own"),
    ("zero_force_ds_cpu_optimizer",): (False, "the optimizer is torch's own"),
    ("torch_autocast", "enabled"): (False, "`bf16` and `fp16` say it"),
    ("amp", "enabled"): (False, "`bf16` and `fp16` say it"),
    ("data_types", "grad_accum_dtype"): ("fp32", "gradients are added up in float32"),
    ("data_types", "param_dtype"): ("fp32", "weights are float32, and `bf16` and `fp16` autocast them"),
    ("gradient_allreduce_op",): ("mean", "a step's loss is divided for gradients that are averaged"),
    ("zero_optimization", "compute_grad_norm"): (True, "the norm of the gradient is logged"),
}
"""A key of DeepSpeed's -> the only value it may have, and why."""
_NO_NUMBERS: Final = {"aio", "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown"}
"""How state is read, and what is told."""


def read_deepspeed(deepspeed: Table | str) -> Table:
    """The configuration without its "auto" and null values: what is absent is ours to say.

    Raises:
        ConfigError: it is no file, or no table.
    """
    if isinstance(deepspeed, dict):
        return _without_auto(deepspeed)
    file = Path(deepspeed)
    if not file.is_file():
        raise ConfigError(
            f"`deepspeed` ({deepspeed!r}) is no file. Type the path of a JSON file, a table, or "
            "`zero_stage=2`."
        )
    try:
        read = json.loads(file.read_text(), object_pairs_hook=_table)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`deepspeed` ({deepspeed}) is not valid JSON: {error}.") from error
    if not isinstance(read, dict):
        raise ConfigError(f"`deepspeed` ({deepspeed}) holds no table, as in {{}}. Write one.")
    return _without_auto(read)


def _table(pairs: list[tuple[str, Any]]) -> Table:
    """An object of a JSON file. Raises ConfigError for a key that it has twice: one would be lost."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"`deepspeed` has `{twice[0]}` twice in one table. Delete one.")
    return dict(pairs)


def _without_auto(section: Table) -> Table:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None and value != "auto"
    }


def resolved_stage(config: RewardConfig) -> int | None:
    """The ZeRO stage of a run, wherever it is said; None: plain PyTorch."""
    if config.deepspeed is None:
        return config.zero_stage
    stage = at(read_deepspeed(config.deepspeed), "zero_optimization", "stage")
    return 0 if stage is None else int(stage)


def shaping(config: RewardConfig) -> Table | None:
    """What of the user's file makes other numbers; None: nothing. Where state lies, in what parts, does not.

    What a field says too is equal, and is left to the field.
    """
    if config.deepspeed is None:
        return None
    table = read_deepspeed(config.deepspeed)
    zero = {key: value for key, value in (table.pop("zero_optimization", None) or {}).items() if value}
    zero = {key: value for key, value in zero.items() if key in QUANTIZED}
    of_fields = {path[0] for path in _SAME} | {"optimizer", "scheduler", "train_batch_size"}
    kept = {key: value for key, value in table.items() if key not in of_fields | _NO_NUMBERS}
    return {**kept, **({"zero_optimization": zero} if zero else {})} or None


def check_deepspeed(config: RewardConfig) -> list[str]:
    """One line for each rule that `config.deepspeed` breaks."""
    if config.deepspeed is None:
        return []
    problems = []
    if config.zero_stage is not None:
        problems.append(
            f"`zero_stage` ({config.zero_stage}) and `deepspeed`: both choose the ZeRO stage. Delete "
            "`deepspeed`, or delete `zero_stage` and put `zero_optimization.stage` into `deepspeed`."
        )
    try:
        table = read_deepspeed(config.deepspeed)
    except ConfigError as problem:
        return [*problems, str(problem)]
    problems += check_keys(table)
    if any(not isinstance(table.get(path[0]) or {}, dict) for path in KEYS if path):
        return problems  # which say so, and nothing can be read there
    problems += [*check_optimizer(table, config), *check_scheduler(table, config)]
    stage = at(table, "zero_optimization", "stage")
    if stage not in (None, 0, 1, 2, 3):
        problems.append(f"`deepspeed.zero_optimization.stage` ({stage!r}) must be 0, 1, 2 or 3.")
    else:
        problems += [*check_offload(table), *check_zero_plus_plus(table, config)]
    for path, field in _SAME.items():
        said, ours = at(table, *path), getattr(config, field)
        if said is not None and said != ours:
            problems.append(
                f"`deepspeed.{'.'.join(path)}` ({said}) and `{field}` ({ours}) are one setting. Type "
                f'`{field}={str(said).lower()}`, or write "auto" in `deepspeed`.'
            )
    for path, (only, why) in _ONLY.items():
        said = at(table, *path)
        if said is not None and said != only:
            problems.append(
                f"`deepspeed.{'.'.join(path)}` ({said}) can only be {json.dumps(only)}: {why}. Delete it."
            )
    return problems + _check_rows(table, config.train_batch_rows(1))


def gathers_model(config: RewardConfig) -> bool:
    """Whether the user's file asks that one rank writes the whole model (DeepSpeed's own words for it)."""
    if config.deepspeed is None:
        return False
    path = ("zero_optimization", "stage3_gather_16bit_weights_on_model_save")
    return at(read_deepspeed(config.deepspeed), *path) is True


def check_zero_init(config: RewardConfig) -> list[str]:
    """One line where `zero_init` asks for what only stage 3 can do."""
    try:
        stage = resolved_stage(config)
    except (ConfigError, TypeError, ValueError):
        return []  # `check_deepspeed` says it
    if config.zero_init is not True or stage == 3:
        return []
    return [
        f"`zero_init` (True) is for ZeRO stage 3, whose workers hold parts of the model, and the stage is "
        f"{stage}. Type `zero_stage=3`, or leave `zero_init` out."
    ]


def check_batch_size(table: Table, config: RewardConfig, num_workers: int) -> None:
    """Raise ConfigError where the file's `train_batch_size` is not the run's rows per step."""
    said, ours = table.get("train_batch_size"), config.train_batch_rows(num_workers)
    if said is not None and said != ours:
        raise ConfigError(
            f"`deepspeed.train_batch_size` ({said}) is not {ours}, the rows of a step: "
            f"`per_device_train_batch_size` ({config.per_device_train_batch_size}) x "
            f"`gradient_accumulation_steps` ({config.gradient_accumulation_steps}) x workers "
            f"({num_workers}){_over_groups(config)}. "
            'Write "auto" in `deepspeed`, or change one of these.'
        )


def _over_groups(config: RewardConfig) -> str:
    size = config.sequence_parallel_size
    return f" / `sequence_parallel_size` ({size})" if size > 1 else ""


def _check_rows(table: Table, rows_per_worker: int) -> list[str]:
    """What can be said of `train_batch_size` before the number of workers is known."""
    said = table.get("train_batch_size")
    if said is None or (isinstance(said, int) and said > 0 and said % rows_per_worker == 0):
        return []
    return [
        f"`deepspeed.train_batch_size` ({said}) must be a multiple of {rows_per_worker}, the product of "
        '`per_device_train_batch_size` and `gradient_accumulation_steps`. Write "auto" in `deepspeed`.'
    ]


def check_one_optimizer(config: RewardConfig) -> None:
    """Raise ConfigError where the file names an optimizer beside the class that the trainer was given."""
    if config.deepspeed is not None and "optimizer" in read_deepspeed(config.deepspeed):
        raise ConfigError(
            "`optimizer_cls_and_kwargs` and the section `optimizer` of `deepspeed` both choose the "
            "optimizer. Delete the section."
        )


def check_partition(table: Table, num_workers: int) -> None:
    """Raise ConfigError where ZeRO++'s partition is not a part of the workers."""
    size = at(table, "zero_optimization", "zero_hpz_partition_size") or 1
    if num_workers % size:
        raise ConfigError(
            f"`deepspeed.zero_optimization.zero_hpz_partition_size` ({size}) must divide the number of "
            f"workers ({num_workers}). Set it to the workers of a node, or train with another number."
        )


def without_effect(table: Table, config: RewardConfig, *, autocast: bool) -> list[str]:
    """What the file says and a run cannot heed, each with the reason. `autocast`: it computes in 16 bits."""
    found = []
    if at(table, "zero_optimization", "overlap_comm"):
        found.append(
            "`deepspeed.zero_optimization.overlap_comm` (true) is off: DeepSpeed overlaps only where it "
            "manages accumulation itself"
        )
    for key, why in (
        ("fp16", "fp16 is autocast, with the loss scale that torch has"),
        ("bf16", "bf16 is autocast over float32 weights, gradients and state"),
        ("bfloat16", "bf16 is autocast over float32 weights, gradients and state"),
    ):
        others = sorted({*table.get(key, {})} - {"enabled"})
        if others and at(table, key, "enabled") is not False:
            found.append(f"`deepspeed.{key}` ({', '.join(others)}) is not used: {why}")
    if table.get("activation_checkpointing"):
        found.append(
            "`deepspeed.activation_checkpointing` is not used: `gradient_checkpointing` says whether layers "
            "are computed again"
        )
    if table.get("communication_data_type") and autocast:
        found.append(
            f"`deepspeed.communication_data_type` ({table['communication_data_type']}) is not used under "
            "autocast: gradients are averaged in float32"
        )
    if (
        "scheduler" in table
        and config.warmup_steps
        and at(table, "scheduler", "params", "warmup_type") is None
    ):
        found.append(
            "`deepspeed.scheduler` warms up in a straight line, as `lr_scheduler_type` does, and not by the "
            'logarithm that DeepSpeed takes where `warmup_type` is not "linear"'
        )
    return found
