"""What sections of a user's DeepSpeed configuration may say: optimizer, schedule, offload, ZeRO++.

The optimizer and the schedule are made by transformers' code from a `RewardConfig`. A section that says the
same passes; DeepSpeed's `WarmupLR` is `constant_with_warmup` and `WarmupDecayLR` is `linear`, as in
transformers' own documentation ("DeepSpeed", Scheduler). Knows neither deepspeed nor torch.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rayrm.config import RewardConfig

Table = dict[str, Any]

SCHEDULES: Final = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}
"""DeepSpeed's schedules -> the `lr_scheduler_type` that they are."""
_OPTIMIZERS: Final = ("adam", "adamw")
# DeepSpeed's Adam decays as AdamW does unless `adam_w_mode` is false.
_ONLY_ADAMW: Final = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
_HOW_COMPUTED: Final = {"torch_adam", "fp32_optimizer_states"}
_OFFLOADED: Final = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
_DEVICES: Final = ("none", "cpu", "nvme")
# Deprecated names, which DeepSpeed reads as a section with device "cpu".
_OLD: Final = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
QUANTIZED: Final = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)


def at(table: Table, *path: str) -> Any:
    """What stands at the path; None where nothing does."""
    found: Any = table
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def check_optimizer(table: Table, config: RewardConfig) -> list[str]:
    """One line for each contradiction of the section `optimizer`."""
    section = table.get("optimizer")
    if section is None:
        return []
    kind = at(table, "optimizer", "type")
    if kind is not None and (str(kind).lower() not in _OPTIMIZERS or not config.optim.startswith("adamw")):
        return [
            f"`deepspeed.optimizer.type` ({kind}) and `optim` ({config.optim}) are one setting. Delete the "
            "section `optimizer`: `optim`, `learning_rate`, `weight_decay` and `adam_*` say it."
        ]
    ours: dict[str, tuple[Any, str]] = {
        "lr": (config.learning_rate, "learning_rate={}"),
        "weight_decay": (config.weight_decay, "weight_decay={}"),
        "eps": (config.adam_epsilon, "adam_epsilon={}"),
        "betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1={} adam_beta2={}"),
    }
    problems = []
    for key, said in (at(table, "optimizer", "params") or {}).items():
        if key in ours:
            problems += _same(f"optimizer.params.{key}", said, *ours[key])
        elif key in _ONLY_ADAMW:
            if said != _ONLY_ADAMW[key]:
                problems.append(
                    f"`deepspeed.optimizer.params.{key}` ({said}) can only be {_word(_ONLY_ADAMW[key])}: "
                    f"`optim` ({config.optim}) is AdamW. Delete it."
                )
        elif key not in _HOW_COMPUTED:
            problems.append(f"`deepspeed.optimizer.params.{key}` ({said}) is no setting of AdamW. Delete it.")
    return problems


def check_scheduler(table: Table, config: RewardConfig) -> list[str]:
    """One line for each contradiction of the section `scheduler`."""
    if table.get("scheduler") is None:
        return []
    kind = at(table, "scheduler", "type")
    if kind is not None and SCHEDULES.get(kind) != config.lr_scheduler_type:
        fix = f"Type `lr_scheduler_type={SCHEDULES[kind]}`, or delete" if kind in SCHEDULES else "Delete"
        return [
            f"`deepspeed.scheduler.type` ({kind}) and `lr_scheduler_type` ({config.lr_scheduler_type}) are "
            f"one setting. {fix} the section `scheduler`."
        ]
    ours: dict[str, tuple[Any, str]] = {
        "warmup_max_lr": (config.learning_rate, "learning_rate={}"),
        "warmup_num_steps": (config.warmup_steps, "warmup_steps={}"),
        "total_num_steps": (config.max_steps, "max_steps={}"),
    }
    only = {"warmup_min_lr": 0, "warmup_type": "linear"}
    problems = []
    for key, said in (at(table, "scheduler", "params") or {}).items():
        if key in ours:
            problems += _same(f"scheduler.params.{key}", said, *ours[key])
        elif key not in only or said != only[key]:
            must = f"can only be {_word(only[key])}" if key in only else "is no setting of this schedule"
            problems.append(f"`deepspeed.scheduler.params.{key}` ({said}) {must}. Delete it.")
    return problems


def _same(path: str, said: Any, ours: Any, fix: str) -> list[str]:
    """`fix`: what to type, with a place for each number said."""
    if said == ours:
        return []
    numbers = said if isinstance(said, list) else [said]
    typed = fix.format(*numbers) if len(numbers) == fix.count("{}") else ""
    fields = ", ".join(f"`{word.partition('=')[0]}`" for word in fix.split())
    return [
        f"`deepspeed.{path}` ({said}) and {fields} ({ours}) are one setting. "
        + (f'Type `{typed}`, or write "auto" in `deepspeed`.' if typed else 'Write "auto" in `deepspeed`.')
    ]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_offload(table: Table) -> list[str]:
    """One line for each rule that `offload_optimizer` and `offload_param` break."""
    zero = at(table, "zero_optimization") or {}
    stage = zero.get("stage", 0)
    problems = [
        f"`deepspeed.zero_optimization.{old}` is a deprecated name. Write "
        f'`"{new}": {{"device": "cpu"}}` in its place.'
        for old, new in _OLD.items()
        if zero.get(old)
    ]
    if zero.get("zenflow"):
        problems.append(
            "`deepspeed.zero_optimization.zenflow` needs an optimizer of DeepSpeed's, and this run's is "
            "torch's. Delete it."
        )
    for section, stages in _OFFLOADED.items():
        device = at(zero, section, "device") or "none"
        name = f"deepspeed.zero_optimization.{section}"
        if device == "none":
            continue
        if device not in _DEVICES:
            problems.append(f'`{name}.device` ({device!r}) must be "none", "cpu" or "nvme".')
            continue
        if stage not in (stages if device == "cpu" else (3,)):
            at_stages = "1, 2 or 3" if section == "offload_optimizer" and device == "cpu" else "3"
            problems.append(
                f"`{name}.device` ({device!r}) is for ZeRO stage {at_stages}, and the stage is {stage}. Set "
                f"`zero_optimization.stage` to {at_stages}, or delete the section."
            )
        path = at(zero, section, "nvme_path")
        if device == "nvme" and not (isinstance(path, str) and PurePosixPath(path).is_absolute()):
            problems.append(
                f"`{name}.nvme_path` ({path!r}) must be an absolute path of a local disk, which is there on "
                'every node, as "/local_nvme".'
            )
        for key, only in (("ratio", 1), ("super_offload", False)):
            said = at(zero, section, key)
            if said is not None and said != only:
                problems.append(
                    f"`{name}.{key}` ({said}) can only be {_word(only)}: another one needs an optimizer of "
                    "DeepSpeed's, and this run's is torch's. Delete it."
                )
    return problems


def check_zero_plus_plus(table: Table, config: RewardConfig) -> list[str]:
    """One line for each rule that the settings of ZeRO++ break."""
    zero = at(table, "zero_optimization") or {}
    stage, size = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    chosen = [key for key in QUANTIZED if zero.get(key)]
    problems = []
    if stage != 3:
        problems += [
            f"`deepspeed.zero_optimization.{key}` ({_word(zero[key])}) is for ZeRO stage 3, and the stage is "
            f"{stage}. Delete it, or set `zero_optimization.stage` to 3."
            for key in [*chosen, *(["zero_hpz_partition_size"] if size != 1 else [])]
        ]
    if "zero_quantized_weights" in chosen and (config.bf16 or config.fp16):
        word = "bf16" if config.bf16 else "fp16"
        problems.append(
            f"`deepspeed.zero_optimization.zero_quantized_weights` (true) and `{word}` (True): DeepSpeed "
            f"does not quantize weights under autocast. Type `{word}=false`, or delete it."
        )
    if not isinstance(size, int) or size < 1:
        problems.append(
            f"`deepspeed.zero_optimization.zero_hpz_partition_size` ({size!r}) must be a whole number from 1 "
            "on: the workers of a node, which hold a whole model together."
        )
    refused = quantized_on_cpu(table) if config.use_cpu else None
    return problems if refused is None else [*problems, refused]


def quantized_on_cpu(table: Table) -> str | None:
    """What ZeRO++ cannot do without a GPU, in words; None where it is not asked for."""
    chosen = [key for key in QUANTIZED if at(table, "zero_optimization", key)]
    if not chosen:
        return None
    return (
        f"`deepspeed.zero_optimization.{chosen[0]}` (true) needs a GPU: DeepSpeed's quantizer is a CUDA "
        "kernel. Delete it, or train on GPUs (`cluster.use_gpu=true`)."
    )


def uses_nvme(table: Table) -> bool:
    """Whether optimizer or parameters go to a disk."""
    return any(at(table, "zero_optimization", section, "device") == "nvme" for section in _OFFLOADED)


def offloads_optimizer(table: Table) -> bool:
    """Whether the optimizer's state lies in host memory or on a disk."""
    return (at(table, "zero_optimization", "offload_optimizer", "device") or "none") != "none"
