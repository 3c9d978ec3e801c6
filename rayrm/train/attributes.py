"""Heads by attribute in a run: put beside the model, told, and folded into its own before it is saved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrm.config import RewardConfig
from rayrm.data.row_index import RowIndex
from rayrm.errors import DataError
from rayrm.model.attribute_head import (
    HEADS_FILE,
    AttributeHead,
    AttributeWeights,
    attribute_head_of,
    open_attributes,
    own_layer,
    put_beside,
    put_reward,
    reward_of,
    saved_attributes,
)
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import unwrapped
from rayrm.model.reward_model import hollow_model
from rayrm.model.sharded import is_sharded

logger = logging.getLogger("rayrm.train")
_SPREAD = 0.02
"""Between new heads, where the model does not say how weights are drawn (`initializer_range`)."""


def give_attributes(model: torch.nn.Module, config: RewardConfig, name: str) -> None:
    """Put heads for `config.attributes` beside the model: those saved in the directory `name`, if any.

    New ones begin with the model's own reward. Raises ModelError where the model's head is not one layer.
    """
    names = tuple(config.attributes)
    saved = saved_attributes(Path(name))
    before = attribute_head_of(model)
    if names and before is not None and before.names == names:
        return
    put_beside(model, None)
    if names and saved == names:
        open_attributes(model, Path(name))
        logger.info("the attributes' heads go on from `%s`", Path(name) / HEADS_FILE)
        return
    if saved:
        logger.warning(
            "`%s` has heads for %s, and `attributes` names %s: they are left out, and the reward is kept",
            name,
            ", ".join(saved),
            ", ".join(names) or "none",
        )
    if not names:
        return
    layer = own_layer(model)
    spread = getattr(unwrapped(model).config.get_text_config(), "initializer_range", None) or _SPREAD
    with _whole(list(layer.parameters())):
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        put_beside(model, AttributeHead.around(names, weight, bias, spread=spread, seed=config.seed))


def check_head(found: Any, config: RewardConfig) -> None:
    """Raise ModelError where a model of the configuration `found` has a head that cannot be folded into.

    The model is made without its weights.
    """
    if not config.attributes or found is None:
        return
    own_layer(hollow_model(found, trust_remote_code=config.trust_remote_code))


def reopen_attributes(model: torch.nn.Module, directory: Path) -> None:
    """Put the heads saved in `directory`, if any, beside the model that was loaded from there."""
    if saved_attributes(directory):
        open_attributes(model, directory)


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
