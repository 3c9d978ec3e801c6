"""Heads by attribute in a run: put beside the model, told, and folded into its own before it is saved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rayrm.config import RewardConfig
from rayrm.data.row_index import RowIndex
from rayrm.errors import DataError
from rayrm.model.attribute_head import (
    HEADS_FILE,
    AttributeHead,
    AttributeWeights,
    attribute_head_of,
    heads_file,
    makes_reward_of,
    own_layer,
    put_beside,
    put_reward,
    read_heads,
    reward_of,
)
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import unwrapped
from rayrm.model.reward_model import hollow_model
from rayrm.model.sharded import is_sharded

logger = logging.getLogger("rayrm.train")
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Of `model_init_kwargs` what says where the model's files are."""
_SPREAD = 0.02
"""Between new heads, where the model does not say how weights are drawn (`initializer_range`)."""


def give_attributes(model: torch.nn.Module, config: RewardConfig, place: str | None) -> None:
    """Put heads for `config.attributes` beside the model: those that it has, or that were saved with it.

    `place`: the directory or hub name that the model comes from, if any. Heads of other attributes, or whose
    reward is not the model's own (it was trained since), are left out. New ones begin with the model's own
    reward. Raises ModelError where the model's head is not one layer.
    """
    names = tuple(config.attributes)
    kept, where = attribute_head_of(model), "the model"
    put_beside(model, None)
    if kept is None and (file := _saved_heads(place, config)) is not None:
        kept, where = read_heads(file), f"`{file}`"
    if kept is not None:
        if (why := _unfit(model, kept, names)) is None:
            put_beside(model, kept.to(own_layer(model).weight))
            logger.info("the attributes' heads go on from %s", where)
            return
        logger.warning(
            "%s has heads for %s, and %s: they are left out, and the reward is kept",
            *(where, ", ".join(kept.names), why),
        )
    if not names:
        return
    layer = own_layer(model)
    spread = getattr(unwrapped(model).config.get_text_config(), "initializer_range", None) or _SPREAD
    with _whole(list(layer.parameters())):
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        put_beside(model, AttributeHead.around(names, weight, bias, spread=spread, seed=config.seed))


def _saved_heads(place: str | None, config: RewardConfig) -> Path | None:
    """The heads saved with the model of `place`; says where nobody could look for them."""
    is_directory = place is not None and Path(place).is_dir()
    if place is None or not (is_directory or (config.attributes and _may_be_on_hub(place))):
        return None
    given = config.model_init_kwargs or {}
    where = {key: given[key] for key in _WHERE if given.get(key) is not None}
    why = "it is not in the cache, and the hub was not reached"
    try:
        found = heads_file(place, **where)
        file = f"{where['subfolder']}/{HEADS_FILE}" if "subfolder" in where else HEADS_FILE
        cache = {key: where[key] for key in ("cache_dir", "revision") if key in where}
        if found or is_directory or try_to_load_from_cache(place, file, **cache) is _CACHED_NO_EXIST:
            return found
    except OSError as error:
        why = str(error).splitlines()[0]
    logger.warning(
        "whether `%s` has heads for attributes (`%s`) is not known, and new ones are made: %s. Download the "
        "whole model first to go on from its heads.",
        *(place, HEADS_FILE, why),
    )
    return None


def _may_be_on_hub(place: str) -> bool:
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return True


def _unfit(model: torch.nn.Module, head: AttributeHead, names: tuple[str, ...]) -> str | None:
    """Why heads are not those that a run with these attributes goes on from; None: they are."""
    if head.names != names:
        return f"`attributes` names {', '.join(names) or 'none'}"
    layer = own_layer(model)
    with _whole([*layer.parameters(), *head.parameters()]):
        return None if makes_reward_of(head, layer) else "they make another reward than its own head"


def check_head(found: Any, config: RewardConfig) -> None:
    """Raise ModelError where a model has a head that cannot be folded into.

    `found`: the model, or its configuration, of which one is made without weights; None: not known yet.
    """
    if not config.attributes or found is None:
        return
    if not isinstance(found, torch.nn.Module):
        found = hollow_model(found, trust_remote_code=config.trust_remote_code)
    own_layer(found)


def reopen_attributes(model: torch.nn.Module, directory: Path) -> None:
    """Put the heads saved in `directory`, if any, beside the model that was loaded from there."""
    if (file := heads_file(str(directory))) is not None:
        put_beside(model, read_heads(file).to(own_layer(model).weight))


def check_rated(index: RowIndex, names: Sequence[str], set_name: str, *, is_sample: bool = False) -> None:
    """Raise DataError where no row is rated by any attribute; log those that no row is rated by.

    Of a stream (`is_sample`) its first rows are looked at, which prove nothing of the others.
    """
    counts = np.zeros(len(names), np.int64)
    if index.attributes.shape[1]:
        counts = (~np.isnan(index.attributes)).sum(axis=0)
    absent = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if not absent:
        return
    rows = f"the first {index.num_rows} rows" if is_sample else f"all {index.num_rows} rows"
    if len(absent) == len(names) and not is_sample:
        raise DataError(
            f"`attributes` ({', '.join(names)}): none of {rows} of `{set_name}` is rated by them. Add "
            "`attributes` (of a pair `chosen_attributes` and `rejected_attributes`) to rows, or delete the "
            "setting."
        )
    logger.warning(
        "`attributes`: %s of `%s` have no rating by %s, whose heads learn from comparisons alone",
        rows,
        set_name,
        ", ".join(absent),
    )


def settle_attributes(module: PackedScorer) -> AttributeWeights | None:
    """Fold the heads into the model's own, as its files hold it; None without attributes.

    Every rank calls it before weights are saved, and gets whole copies of what it wrote.
    """
    head, model = module.attributes, module.model
    if head is None:
        return None
    with _whole(list(head.parameters())):
        copies, reward = head.copies(), reward_of(head)
    layer = own_layer(model)
    if is_sharded(layer.weight):
        from rayrm.train.zero import gathered

        with gathered(list(layer.parameters()), changed=True), torch.no_grad():
            for key, value in reward.items():
                getattr(layer, key).copy_(value)
    else:
        put_reward(layer, reward)
    owners = {parameter: key for key, parameter in layer.named_parameters()}
    named = {name: owners[parameter] for name, parameter in model.named_parameters() if parameter in owners}
    return AttributeWeights(
        head.names, copies, {name: reward[key].to("cpu", copy=True) for name, key in named.items()}
    )


def gate_record(module: PackedScorer) -> dict[str, float]:
    """The gate's weights by attribute, for the log; every rank calls it."""
    head = module.attributes
    if head is None:
        return {}
    with _whole([head.gate, head.weight]), torch.no_grad():
        weights: list[float] = head.gate_weights().tolist()
    return {f"gate_{name}": weight for name, weight in zip(head.names, weights, strict=True)}


def _whole(parameters: list[Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, these parameters are whole on every rank."""
    if not any(map(is_sharded, parameters)):
        return contextlib.nullcontext()
    from rayrm.train.zero import gathered

    return gathered(parameters)
