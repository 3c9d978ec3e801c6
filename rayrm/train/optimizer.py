"""The optimizer and learning-rate schedule that a `RewardConfig` names, made by transformers' own code."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import check_one_optimizer
from rayrm.errors import ConfigError

logger = logging.getLogger("rayrm.train")
OptimizerSpec = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Optimizers = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]
"""In memory, over the parameters of a model in memory."""

# What transformers' Trainer leaves without weight decay.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# Beside the model, where attributes are: a gate would be drawn even, and offsets are biases.
_NO_DECAY.append(r"^attributes\.(?:gate|offset)$")


def make_optimizer(
    model: torch.nn.Module, config: RewardConfig, spec: OptimizerSpec | None = None
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters: biases and norms without decay, as transformers does.

    `spec` (class, keyword arguments) replaces what `config.optim` names.
    """
    decayed = {
        name
        for name in get_parameter_names(model, [torch.nn.LayerNorm], _NO_DECAY)
        if not re.search(r"bias", name)
    }
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    made, kwargs = spec or Trainer.get_optimizer_cls_and_kwargs(config)
    return made([group for group in groups if group["params"]], **kwargs)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: RewardConfig, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of `config` over a run of `num_steps` optimizer steps."""
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=config.warmup_steps_for(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
    )
    return scheduler


def _check_schedule(config: RewardConfig) -> None:
    """Raise ConfigError for `lr_scheduler_kwargs` that the schedule does not take."""
    try:
        if config.lr_scheduler_kwargs and config.lr_scheduler_type.startswith("constant"):
            raise TypeError("it takes no further arguments, and transformers leaves them out")
        make_scheduler(torch.optim.SGD([torch.zeros(1)]), config, num_steps=2)
    except (TypeError, ValueError) as error:
        given = f"`lr_scheduler_kwargs` ({config.lr_scheduler_kwargs}) and "
        raise ConfigError(
            f"{given if config.lr_scheduler_kwargs else ''}`lr_scheduler_type` ({config.lr_scheduler_type}): "
            f"{error}. See transformers' `get_scheduler` for what each schedule takes."
        ) from error


def check_optimizers(
    given: tuple[Any, Any],
    spec: OptimizerSpec | None,
    config: RewardConfig,
    *,
    num_workers: int,
    has_adapter: bool,
) -> Optimizers | None:
    """`optimizers` as the trainer was given them; None for (None, None). Raises ConfigError."""
    if spec is not None:
        check_one_optimizer(config)
        if named := sorted({"params", "model"} & set(spec[1])):
            raise ConfigError(
                f"`optimizer_cls_and_kwargs` has `{named[0]}`, and is given the parameters of each worker's "
                "model. Leave it out: what is not to be trained is frozen (`requires_grad_(False)`) in the "
                "model that is passed, or left out of `optimizers`."
            )
    optimizer, scheduler = given
    if scheduler is None:
        _check_schedule(config)
    if optimizer is None and scheduler is None:
        return None
    refused = None
    if optimizer is None:
        refused = "has a scheduler and no optimizer, and a scheduler is made over one. Pass both"
    elif spec is not None:
        refused = "comes together with `optimizer_cls_and_kwargs`, which makes another one. Leave one out"
    elif num_workers:
        refused = (
            "is in this process's memory, and the workers' parameters are their own. Pass "
            "`optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`, which each worker calls"
        )
    elif config.zero_stage is not None or config.deepspeed is not None:
        refused = "would step parameters that ZeRO cuts anew. Pass `optimizer_cls_and_kwargs`"
    elif has_adapter:
        refused = (
            "was made before the adapter of `peft_config`, so that it does not hold its parameters. Make the "
            "`PeftModel` yourself and leave `peft_config` out, or pass `optimizer_cls_and_kwargs`"
        )
    elif config.attributes:
        refused = (
            "was made before the heads of `attributes`, so that it does not hold their parameters. Pass "
            "`optimizer_cls_and_kwargs`"
        )
    elif not isinstance(optimizer, torch.optim.Optimizer):
        refused = f"has a {type(optimizer).__name__}, which is no `torch.optim.Optimizer`"
    if refused is not None:
        raise ConfigError(f"`optimizers` {refused}.")
    return optimizer, scheduler


def check_holds(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Raise ConfigError unless an optimizer's parameters are the model's; say which it leaves as they are."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if strange := len(mine - {id(parameter) for parameter in model.parameters()}):
        raise ConfigError(
            f"`optimizers`: {strange} of its {len(mine)} parameters are not the model's. Pass the model as "
            "an object, and make the optimizer of that object's parameters (after `resize_token_embeddings`, "
            "where the tokenizer has more tokens)."
        )
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
    if left:
        logger.warning(
            "`optimizers` holds all parameters but %d, which stay as they are: %s",
            *(len(left), ", ".join(left[:3])),
        )


def made_of(given: Optimizers | None) -> OptimizerSpec | None:
    """The class of an optimizer in memory and what it was made with, by which a run knows it again."""
    return None if given is None else (type(given[0]), dict(given[0].defaults))
