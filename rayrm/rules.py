"""What holds between the settings of a `RewardConfig`: TRL's resolved defaults, and the cross-field rules.

Each rule's error is "field (value), rule, fix", and all that are broken are told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from rayrm.deepspeed_rules import check_deepspeed, check_zero_init
from rayrm.objective import ATTRIBUTE_NAME, check_objective
from rayrm.settings import nearest
from rayrm.unsupported import GONE, INSTEAD, NOT_HONOURED, RENAMED
from rayrm.urls import is_url, masked

if TYPE_CHECKING:
    from rayrm.config import RewardConfig

SAME: Final[dict[str, str]] = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""transformers' newer name for one of our fields -> the field."""
REPORTERS: Final = ("tensorboard", "wandb", "mlflow", "trackio")
_STORES: Final = ("s3", "s3a", "s3n", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
"""The schemes of the stores that pyarrow writes to."""
_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_SWITCHES: Final = ("nesterov", "centered")
_ERRORS: Final = ("loss", "mse", "brier")
_BY_ATTRIBUTE: Final = re.compile(f"attribute_(mse|pearson)_{ATTRIBUTE_NAME.pattern}$")


def is_error(metric: str) -> bool:
    """Whether less of a metric is better: a loss, as in transformers, and the errors that are measured here.

    "eval_loss", "eval_helpful_mse", "brier". What is measured by attribute ends in the attribute's name,
    which says nothing of it: "eval_attribute_mse_good" is one, "eval_attribute_pearson_loss" none.
    """
    by_attribute = _BY_ATTRIBUTE.search(metric)
    return metric.endswith(_ERRORS) if by_attribute is None else by_attribute[1] == "mse"


def adopt_trl_names(names: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Translate TRL's alternative names, drop unsupported ones that stand at their default, refuse the rest.

    Raises ValueError with one line for each refused name.
    """
    adopted: dict[str, Any] = {}
    problems = []
    for name, value in names.items():
        if name in SAME:
            field = SAME[name]
            if value is not None and names.get(field, value) != value:
                problems.append(f"`{name}` ({value!r}) and `{field}` are one setting. Give one of them.")
            elif value is not None:
                adopted[field] = value
        elif name in RENAMED:
            problems.append(f"`{name}` ({value!r}) is no setting here. Type `{RENAMED[name]}`.")
        elif name in GONE:
            problems.append(f"`{name}` ({value!r}) is no setting any more. Delete it: {GONE[name]}")
        elif name in NOT_HONOURED:
            only = NOT_HONOURED[name]
            if not _is_default(value, only):
                problems.append(
                    f"`{name}` ({value!r}) is not supported: it can only be {only!r}. {INSTEAD[name]}"
                )
        elif name not in known:
            near = nearest(name, [*known, *NOT_HONOURED, *SAME])
            problems.append(f"`{name}` is no setting of RewardConfig.{near}")
        else:
            adopted[name] = value
    if problems:
        raise ValueError("\n".join(problems))
    return adopted


def _is_default(value: Any, default: Any) -> bool:
    plain = getattr(value, "value", value)  # an enumeration's member stands for its value
    if isinstance(plain, str) and not isinstance(default, str):
        return plain.lower() == str(default).lower()
    return bool(plain == default) or (not plain and not default and type(plain) is not bool)


def resolve_defaults(config: RewardConfig) -> None:
    """Put what TRL derives from other settings in the place of None, "auto" and "none"."""
    resolved: dict[str, Any] = {
        "output_dir": os.path.expanduser(config.output_dir or "trainer_output"),
        "bf16": not config.fp16 if config.bf16 is None else config.bf16,
        "disable_tqdm": bool(config.disable_tqdm),
        "do_eval": config.do_eval or config.eval_strategy != "no",
        "report_to": _reporters(config.report_to),
        "pad_to_multiple_of": _multiple(config.pad_to_multiple_of),
    }
    if config.eval_strategy == "steps" and not config.eval_steps:
        resolved["eval_steps"] = config.logging_steps
    metric = config.metric_for_best_model
    if metric is None and config.load_best_model_at_end:
        metric = resolved["metric_for_best_model"] = "loss"
    if metric is not None and config.greater_is_better is None:
        resolved["greater_is_better"] = not is_error(metric)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        steps = resolved.get(name, getattr(config, name))
        if steps is not None and steps == int(steps):
            resolved[name] = int(steps)
    vars(config).update(resolved)


def _reporters(given: str | list[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    return [] if names == ["none"] else names


def _multiple(given: int | str | None) -> int | None:
    if given is None or (isinstance(given, str) and given.lower() in ("auto", "none", "null")):
        return None
    try:
        multiple = int(given)
    except ValueError:
        multiple = 0
    if multiple < 1:
        raise ValueError(f'`pad_to_multiple_of` ({given!r}) must be "auto", or a whole number from 1.')
    return multiple


def check_reward_config(config: RewardConfig) -> None:
    """Raise ValueError with one line for each rule between fields that `config` breaks."""
    problems = [
        *_check_steps(config),
        *_check_best_model(config),
        *_check_order(config),
        *_check_precision(config),
        *check_deepspeed(config),
        *check_objective(config),
        *check_zero_init(config),
    ]
    for reporter in config.report_to:
        if reporter not in REPORTERS:
            problems.append(
                f"`report_to` ({reporter!r}) is not supported: it can be none or {', '.join(REPORTERS)}. "
                "Type `report_to=tensorboard,wandb`; `metrics.jsonl` holds every metric for other tools."
            )
    if config.storage_path is not None and not is_url(config.storage_path):
        problems.append(
            f"`storage_path` ({config.storage_path!r}) is an object store's URL. Type one such as "
            "s3://bucket/runs; `output_dir` is the run's directory."
        )
    elif config.storage_path is not None and masked(config.storage_path) != config.storage_path:
        problems.append(
            f"`storage_path` ({masked(config.storage_path)}) holds credentials, and a run writes its "
            "settings down. Set them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
        )
    elif config.storage_path is not None:
        scheme = config.storage_path.partition("://")[0].lower()
        if scheme not in _STORES:
            problems.append(
                f"`storage_path` ({config.storage_path}): `{scheme}` is no store that checkpoints can be "
                f"written to.{nearest(scheme, _STORES)} Type a URL of s3://, gs://, abfs://, hdfs:// or "
                "file://."
            )
    try:
        parse_optim_args(config.optim, config.optim_args)
    except ValueError as problem:
        problems.append(str(problem))
    if problems:
        raise ValueError("\n".join(problems))


def _check_steps(config: RewardConfig) -> list[str]:
    problems = []
    if config.max_steps == 0:
        problems.append(
            "`max_steps` (0) must be -1 (go by `num_train_epochs`) or at least 1. Type `max_steps=-1`."
        )
    intervals = [
        ("logging_steps", config.logging_steps, config.logging_strategy),
        ("eval_steps", config.eval_steps, config.eval_strategy),
        ("save_steps", config.save_steps, config.save_strategy),
    ]
    for name, steps, strategy in intervals:
        if strategy == "steps" and not steps:
            problems.append(
                f'`{name}` ({steps}) must be above 0. Type `{name}=100`, or turn it off by strategy "no".'
            )
        elif strategy == "steps" and steps is not None and steps > 1 and steps != int(steps):
            problems.append(
                f"`{name}` ({steps}) must be a whole number, or below 1 (a share of all steps). "
                f"Type `{name}={int(steps)}`."
            )
    return problems


def _check_order(config: RewardConfig) -> list[str]:
    if config.train_sampling_strategy == "sequential" and config.shuffle:
        return [
            '`train_sampling_strategy` ("sequential") and `shuffle` (True) contradict each other. Delete one.'
        ]
    return []


def _check_best_model(config: RewardConfig) -> list[str]:
    if config.save_strategy == "best" and (
        config.metric_for_best_model is None or config.eval_strategy == "no"
    ):
        return [
            '`save_strategy` ("best") needs evaluations, and a metric by which one is the best: '
            f'`eval_strategy` is "{config.eval_strategy}" and `metric_for_best_model` is '
            f"{config.metric_for_best_model}. Type `eval_strategy=steps metric_for_best_model=accuracy`."
        ]
    if not config.load_best_model_at_end or config.save_strategy == "best":
        return []
    if config.eval_strategy == "no" or config.save_strategy != config.eval_strategy:
        return [
            "`load_best_model_at_end` (True) needs an evaluation at every checkpoint: "
            f'`save_strategy` ("{config.save_strategy}") and `eval_strategy` ("{config.eval_strategy}") '
            "must be the same and on. "
            "Type `eval_strategy=steps save_strategy=steps`."
        ]
    save, evaluate = config.save_steps, config.eval_steps
    if config.save_strategy != "steps" or evaluate is None:
        return []
    if (save < 1) != (evaluate < 1):
        return [
            f"`save_steps` ({save:g}) and `eval_steps` ({evaluate:g}): with `load_best_model_at_end` both "
            f"must be counts, or both shares of all steps. Type `save_steps={evaluate:g}`."
        ]
    if abs(save / evaluate - round(save / evaluate)) > 1e-6 or save < evaluate:
        return [
            f"`save_steps` ({save:g}) must be a multiple of `eval_steps` ({evaluate:g}) with "
            "`load_best_model_at_end`: every checkpoint needs its evaluation. "
            f"Type `save_steps={max(1, round(save / evaluate)) * evaluate:g}`."
        ]
    return []


def _check_precision(config: RewardConfig) -> list[str]:
    problems = []
    if config.bf16 and config.fp16:
        problems.append(
            "`bf16` (True) and `fp16` (True): at most one can be on. Type `fp16=false` or `bf16=false`."
        )
    if config.fp16 and config.use_cpu:
        problems.append("`fp16` (True) needs a GPU, and `use_cpu` is True. Type `fp16=false`.")
    return problems


def parse_optim_args(optim: str, optim_args: str | None) -> dict[str, float | bool]:
    """ "momentum=0.9, nesterov=true" -> {"momentum": 0.9, "nesterov": True}. Raises ValueError."""
    if not optim_args or optim_args.strip().lower() == "none":
        return {}
    allowed = _OPTIONS.get(optim)
    if allowed is None:
        raise ValueError(
            f"`optim_args` ({optim_args!r}): `{optim}` takes none. Use `adam_beta1`, `adam_beta2` and so on."
        )
    options: dict[str, float | bool] = {}
    for setting in optim_args.replace(" ", "").split(","):
        name, _, text = setting.partition("=")
        if name not in allowed:
            raise ValueError(
                f"`optim_args` ({setting!r}): `{optim}` takes {', '.join(allowed)}.{nearest(name, allowed)}"
            )
        try:
            options[name] = text.lower() in ("true", "1", "yes") if name in _SWITCHES else float(text)
        except ValueError:
            raise ValueError(
                f"`optim_args` ({setting!r}): `{name}` needs a number, as in `{name}=0.9`."
            ) from None
    return options
