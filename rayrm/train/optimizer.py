"""The optimizer and learning-rate schedule that a `RewardConfig` names, made by transformers' own code."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rayrm.config import RewardConfig

OptimizerSpec = tuple[type[torch.optim.Optimizer], dict[str, Any]]

# What transformers' Trainer leaves without weight decay.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


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
