"""Score a set of rows on all ranks and bring the scores together: exact, each row once.

Shapes: N completions of R rows. The order of the result is the set's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers.trainer_utils import speed_metrics

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import ConfigError
from rayrm.model.attention import AttentionPath
from rayrm.model.attention_path import choose_path
from rayrm.model.cost import attention_weight_of
from rayrm.model.forward import DeviceBatch, PackedScorer, to_device
from rayrm.model.layout import Layout, choose_layout, unwrapped
from rayrm.model.sequence import SequencePart
from rayrm.train.checkpoint import TrainState
from rayrm.train.loop import Record
from rayrm.train.precision import autocast_dtype, in_precision, resolve_precision

logger = logging.getLogger("rayrm.train")
Scores = npt.NDArray[np.float64]
DEFAULT_TOKEN_BUDGET = 8192
_ROWS_PER_ROUND = 256


class RowSet(Protocol):
    """Tokenized rows by position, and what is known of them without their ids."""

    @property
    def num_rows(self) -> int: ...

    index: RowIndex

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]: ...

    def name_of(self, row: TokenizedRow) -> str: ...


def score_rows(
    scores_of: Callable[[DeviceBatch], torch.Tensor],
    rows: RowSet,
    *,
    layout: Layout,
    path: AttentionPath | None,
    pad_token_id: int | None,
    max_tokens: int,
    device: torch.device,
    attention_weight: float = 0.0,
    part: SequencePart | None = None,
) -> Scores:
    """The scores of all completions, in the order of `rows.index`, `[N]`, on every rank.

    With attributes `[N, 1 + A]`: the ratings foretold beside each score. `part`: of ranks that score each
    micro-batch together, of which each computes up to `max_tokens`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    parts = 1 if part is None else part.size
    groups, group = world // parts, rank // parts
    shares = layout.name == "shared"
    found: Scores | None = None
    order = rows.index.alike_together
    for begin in range(0, rows.num_rows, _ROWS_PER_ROUND * groups):
        chosen = order[begin : begin + _ROWS_PER_ROUND * groups]
        costs = rows.index.take(chosen).costs(share=shares, padded=layout.name == "padded")
        budget = max(max_tokens * parts, int(costs.tokens.max()))
        plan = plan_step(costs, num_ranks=groups, max_tokens=budget, attention_weight=attention_weight)
        for microbatch in plan[group]:
            places = chosen[list(microbatch.rows)]
            batch = pack_rows(rows.fetch(places), pad_token_id, share=shares)
            with torch.inference_mode():
                scores = scores_of(to_device(batch, device, path, part)).double().cpu().numpy()
            if found is None:
                found = np.zeros((len(rows.index.lengths), *scores.shape[1:]))
            if microbatch.weights[0] > 0 and (part is None or part.counts):
                found[rows.index.places(places)] = scores
    if found is None:
        return np.zeros(0)
    if world > 1:
        # Each row was scored by one rank and is zero on the others.
        total = torch.from_numpy(found).to(device)
        dist.all_reduce(total)
        found = total.cpu().numpy()
    return found


def score_model(
    model: torch.nn.Module,
    rows: RowSet,
    config: RewardConfig,
) -> Scores:
    """Score rows with a model in this process, in the precision that training uses."""
    with scorer_of(model, config, longest=int(rows.index.lengths.max())) as scores_of:
        return scores_of(rows)


@contextmanager
def scorer_of(
    model: torch.nn.Module, config: RewardConfig, *, longest: int
) -> Iterator[Callable[[RowSet], Scores]]:
    """What scores rows of up to `longest` tokens with a model in this process, as long as the block lasts."""
    device = next(model.parameters()).device
    layout = choose_layout(model, share_prefix=config.share_prefix, longest=longest, train=False)
    precision = resolve_precision(config, device)
    path = choose_path(model, device, autocast_dtype(precision))
    logger.info("%s", layout)
    if layout.name != "padded":
        logger.info("%s", path)
    module = PackedScorer(model, layout, path=path.name)
    was_training = model.training
    module.eval()
    try:
        yield partial(
            score_rows,
            lambda batch: in_precision(module, batch, precision),
            layout=layout,
            path=module.path,
            pad_token_id=unwrapped(model).config.get_text_config().pad_token_id,
            max_tokens=config.max_tokens_per_microbatch or DEFAULT_TOKEN_BUDGET,
            device=device,
            attention_weight=attention_weight_of(model),
        )
    finally:
        module.release()
        module.train(was_training)


def speed_of(prefix: str, began: float, num_rows: int, batch_rows: int) -> Record:
    """How fast a set was evaluated since `began` (`time.time()`), by transformers' names ("eval_runtime")."""
    steps = math.ceil(num_rows / batch_rows)
    return dict(speed_metrics(prefix.rstrip("_"), began, num_samples=num_rows, num_steps=steps))


def note_metric(state: TrainState, found: Record, config: RewardConfig) -> float | None:
    """Note an evaluation's `metric_for_best_model`, which is returned; None where there is no such setting.

    As with transformers every evaluation counts but the one before the first step. Raises ConfigError where
    the evaluation has no such metric.
    """
    wanted = config.metric_for_best_model
    if wanted is None:
        return None
    name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    value = found.get(name)
    if value is None:
        metrics = ", ".join(sorted(key for key in found if key.startswith("eval_")))
        raise ConfigError(f"`metric_for_best_model` ({wanted}) is not a metric of this run: {metrics}.")
    if state.step > 0 and is_better(value, state.best_metric, config):
        state.best_metric = value
    return value


def note_checkpoint(state: TrainState, value: float | None, config: RewardConfig) -> None:
    """Note in `state` whether its step's checkpoint, whose metric is `value`, is the best so far.

    A better model that no checkpoint holds does not stand in the way of one that is kept.
    """
    if value is not None and is_better(value, state.best_checkpoint_metric, config):
        state.best_checkpoint, state.best_checkpoint_metric = f"checkpoint-{state.step}", value


def is_better(value: float, than: float | None, config: RewardConfig) -> bool:
    """Whether `metric_for_best_model` is better at `value`: any number is than None, and NaN is never."""
    if than is None:
        return not math.isnan(value)
    return value > than if config.greater_is_better else value < than
