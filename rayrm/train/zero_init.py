"""Building a model in parts: under ZeRO-3 no rank ever holds all of it (`zero_init`).

While transformers knows of a ZeRO-3 configuration, `from_pretrained` makes each module under
`deepspeed.zero.Init`, which leaves every rank its part, and gives out the weights module by module: rank 0
alone reads them (transformers 5, `integrations/deepspeed.py`). What is drawn at random, a reward head, is
drawn as of a whole model, so that the run is the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import read_deepspeed, resolved_stage
from rayrm.errors import ConfigError
from rayrm.model.adapters import ADAPTER_CONFIG
from rayrm.model.reward_model import hollow_model
from rayrm.train.nvme import buffers_told, in_own_folders
from rayrm.train.rank import Hosts, Rank
from rayrm.train.system_memory import available_memory

_SHARE = 0.5
"""Of a host's free memory, which whole copies of the model may take while it is loaded."""
_DTYPES = ("float32", torch.float32)


def builds_in_parts(
    name: str | None,
    config: RewardConfig,
    rank: Rank,
    hosts: Hosts,
    say: Callable[[str], None],
    *,
    trains_tokens: bool = False,
) -> bool:
    """Whether the ranks load the model `name` (None: it is in memory) in parts; every rank calls this.

    `trains_tokens`: an adapter trains embeddings of single tokens.
    """
    if config.zero_init is False or resolved_stage(config) != 3:
        return False
    if rank.count == 1:
        if config.zero_init:
            say("`zero_init` (True) sets nothing here: one worker holds all of the model")
        return False
    check_zero_init_of(name, config)
    if config.zero_init:
        say("`zero_init`: the model is loaded in parts")
        return True
    if name is None or _what_is_against(name, config) or (trains_tokens and rank.device.type == "cpu"):
        return False
    needed = 4 * _num_parameters(name, config) * int(os.environ.get("LOCAL_WORLD_SIZE", rank.count))
    free = available_memory()
    # Free memory differs between hosts, and from one moment to the next: where one is short, all load parts.
    short = bool(hosts.most(int(free is not None and needed > _SHARE * free)))
    if short:
        say(
            f"the model is loaded in parts (`zero_init`): a copy for each worker of a host takes "
            f"{needed / 2**30:.3g} GiB"
            + ("" if free is None else f", and {free / 2**30:.3g} GiB of its memory are free")
        )
    return short


def check_zero_init_of(name: str | None, config: RewardConfig) -> None:
    """Raise ConfigError where `zero_init` asks for parts of a model that cannot be loaded so."""
    if config.zero_init and (against := _what_is_against(name, config)):
        raise ConfigError(f"`zero_init` (True) cannot load this model: {against}. Leave `zero_init` out.")


def check_tokens_in_parts(config: RewardConfig, *, trains_tokens: bool, on_cpu: bool) -> None:
    """Raise ConfigError where an adapter would train single tokens of an embedding that is in parts.

    PEFT 0.21 gathers their rows on a CUDA device, whatever the model is on (`TrainableTokensLayer`).
    """
    if config.zero_init and trains_tokens and on_cpu:
        raise ConfigError(
            "`zero_init` (True) on CPUs: the adapter trains embeddings of single tokens, which PEFT takes "
            "from a model in parts on GPUs only. Leave `zero_init` out, or train on GPUs "
            "(`cluster.use_gpu=true`)."
        )


def _what_is_against(name: str | None, config: RewardConfig) -> str:
    """Why a model cannot be loaded in parts, or an empty string."""
    init = config.model_init_kwargs or {}
    if name is None:
        return "it is in memory already, whole"
    if config.attributes:
        return "`attributes` are made around its own head, whole"
    if (Path(name) / ADAPTER_CONFIG).exists():
        return f"`{name}` is an adapter"
    if init.get("dtype", "float32") not in _DTYPES:
        return f"parts are float32, and `model_init_kwargs` asks for `dtype={init['dtype']}`"
    for key in ("gguf_file", "quantization_config", "device_map"):
        if init.get(key) is not None:
            return f"`model_init_kwargs` has `{key}`"
    return ""


def _num_parameters(name: str, config: RewardConfig) -> int:
    """Of the model as it will be loaded, counted without its weights."""
    init = {"trust_remote_code": config.trust_remote_code, **(config.model_init_kwargs or {})}
    found = AutoConfig.from_pretrained(name, **{**init, "num_labels": 1})
    model = hollow_model(found, trust_remote_code=config.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def in_parts(config: RewardConfig, device: torch.device) -> Iterator[None]:
    """What transformers loads inside is made and kept in parts; all ranks load the same."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    from rayrm.train.zero import import_deepspeed

    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(
        dist_backend=deepspeed.accelerator.get_accelerator().communication_backend_name(),
        dist_init_required=False,
    )
    chosen: dict[str, Any] = {} if config.deepspeed is None else read_deepspeed(config.deepspeed)
    table: dict[str, Any] = {
        "zero_optimization": {**in_own_folders(chosen.get("zero_optimization", {})), "stage": 3},
        "train_micro_batch_size_per_gpu": 1,
    }
    if "aio" in chosen:
        table["aio"] = chosen["aio"]  # parts go to the disk as they are made
    # transformers keeps no reference of its own.
    alive = HfDeepSpeedConfig(table)
    try:
        with buffers_told():
            yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextlib.contextmanager
def whole_in_turn(model: torch.nn.Module) -> Iterator[None]:
    """Forwards of a model in parts, before an engine has it: a module's weights are whole while it computes.

    All ranks run the same forwards.
    """
    from rayrm.train.zero import gathered

    inside: list[tuple[torch.nn.Module, contextlib.ExitStack]] = []

    def gather(module: torch.nn.Module, _: Any) -> None:
        around = contextlib.ExitStack()
        around.enter_context(gathered(list(module.parameters(recurse=False))))
        inside.append((module, around))

    def part(module: torch.nn.Module, *_: Any) -> None:
        while inside and inside[-1][0] is not module:
            inside.pop()[1].close()  # of a module whose forward raised, and was caught
        inside.pop()[1].close()

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(gather).remove)
                hooks.callback(module.register_forward_hook(part).remove)
        try:
            yield
        finally:
            for _, around in reversed(inside):
                around.close()
