"""Sequence parallelism: `sequence_parallel_size` neighbouring ranks compute each micro-batch together.

A group of ranks takes one share of a step's plan, as a single rank does without. Each of its ranks has its
part of the tokens of every micro-batch and the same loss; gradients are averaged over all ranks of the run,
so that neither engine knows of groups. What is counted over ranks is counted by the first of each group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.model.cost import head_sizes
from rayrm.model.layout import Layout, unwrapped
from rayrm.model.sequence import SequencePart
from rayrm.train.rank import Rank

_NAME = "sequence_parallel_size"


def check_workers(config: RewardConfig, num_workers: int) -> None:
    """Raise ConfigError where the workers (0: this process) do not make whole groups."""
    size, count = config.sequence_parallel_size, max(1, num_workers)
    if count % size == 0:
        return
    fitting = max(size, count - count % size)
    have = f"the number of workers ({num_workers})" if num_workers else "the workers, and this process is one"
    raise ConfigError(
        f"`{_NAME}` ({size}) must divide {have}: each {size} of them compute their rows together. Type "
        f"`cluster.num_workers={fitting}` (in Python `scaling_config=ScalingConfig(num_workers={fitting})`), "
        f"or `{_NAME}=1`."
    )


def check_heads(model_config: Any, config: RewardConfig) -> None:
    """Raise ConfigError where the heads of a model's attention cannot be dealt to a group's ranks."""
    size = config.sequence_parallel_size
    if size == 1:
        return
    settings = model_config.get_text_config()
    sizes, heads = head_sizes(settings), getattr(settings, "num_attention_heads", 0)
    groups = getattr(settings, "num_key_value_heads", None) or heads
    if sizes is None or not isinstance(groups, int):
        raise ConfigError(
            f"`{_NAME}` ({size}) wants equally many heads of one size in every layer, and the model's config "
            f"does not say them. Type `{_NAME}=1`."
        )
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"`{_NAME}` ({size}) wants keys and values of one size, and the model's have {sizes[0]} and "
            f"{sizes[1]}. Type `{_NAME}=1`."
        )
    if heads % size or (groups % size and size % groups):
        fitting = [n for n in range(1, heads + 1) if not heads % n and (not groups % n or not n % groups)]
        raise ConfigError(
            f"`{_NAME}` ({size}): the model's {heads} heads of attention, over {groups} of keys and values, "
            f"cannot be dealt evenly to {size} workers. It can be {', '.join(map(str, fitting))}."
        )


def check_layout(layout: Layout, config: RewardConfig) -> None:
    """Raise ConfigError for rows that are to be padded: a part of their tokens is no part of each."""
    if config.sequence_parallel_size > 1 and layout.name == "padded":
        raise ConfigError(
            f"`{_NAME}` ({config.sequence_parallel_size}) needs packed rows, and this run's are padded: "
            f"{layout.reason}. Type `{_NAME}=1`, or change what stands in the way (`max_length`, where a "
            "window or a rope's limit is shorter; `disable_dropout=true`, where it is dropout)."
        )


def sequence_part(config: RewardConfig, model: torch.nn.Module, rank: Rank) -> SequencePart | None:
    """This rank's place in its group; None without sequence parallelism. Every rank calls it."""
    size = config.sequence_parallel_size
    check_workers(config, rank.count)
    if size == 1:
        return None
    settings = unwrapped(model).config
    check_heads(settings, config)
    from rayrm.train.zero import exchange_in

    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, rank.count, size)]
    group = groups[rank.index // size]
    assert group is not None
    return SequencePart(
        rank.index % size, size, group, exchange_in(group, settings.get_text_config(), rank.device)
    )
