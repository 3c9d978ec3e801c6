"""What a rank trains: the model, how its rows are laid out and attend, token budget, engine and export."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from rayrm.config import RewardConfig
from rayrm.model.attention_path import choose_path
from rayrm.model.cost import attention_weight_of
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout, choose_layout, unwrapped
from rayrm.train.budget import Probe, decide_budget
from rayrm.train.build import build_model
from rayrm.train.build_engine import build_engine
from rayrm.train.engine import Engine
from rayrm.train.export import ModelExport
from rayrm.train.job import TrainJob
from rayrm.train.positions import check_positions, check_rope
from rayrm.train.precision import autocast_dtype, resolve_precision
from rayrm.train.rank import Rank

logger = logging.getLogger("rayrm.train")
_EVAL_ROWS = RewardConfig.per_device_eval_batch_size


@dataclass(frozen=True, slots=True)
class RankModel:
    """`export`: of the rank that saves the model, None on all others."""

    module: PackedScorer
    layout: Layout
    pad_token_id: int
    attention_weight: float
    max_tokens: int
    engine: Engine
    export: ModelExport | None


def build_rank_model(job: TrainJob, rank: Rank, num_steps: int, around: contextlib.ExitStack) -> RankModel:
    """Seed before calling. `around` gives a model that was given back as it was, when it ends."""
    config = job.config

    def say(message: str) -> None:
        if rank.index == 0:
            logger.info("%s", message)

    built = job.built if job.built is not None else build_model(job.source, config, job.tokenizer)
    model = built.to(rank.device)
    longest = max(int(s.index.lengths.max()) for s in (job.train_set.sample, *job.eval_sets.values()))
    check_positions(unwrapped(model), longest, say)
    check_rope(unwrapped(model), longest, config, rank.count)
    layout = choose_layout(model, share_prefix=config.share_prefix, longest=longest)
    say(str(layout))
    if config.per_device_eval_batch_size != _EVAL_ROWS:
        say(
            f"`per_device_eval_batch_size` ({config.per_device_eval_batch_size}) sets nothing here: "
            "evaluation goes by tokens (`max_tokens_per_microbatch`), and its metrics depend on neither"
        )
    precision = resolve_precision(config, rank.device)
    path = choose_path(model, rank.device, autocast_dtype(precision))
    if layout.name != "padded":
        say(str(path))
    attention_weight = attention_weight_of(model)
    export = ModelExport(model, job.tokenizer, job.text_form) if rank.index == 0 else None
    multiple = config.pad_to_multiple_of
    module = PackedScorer(
        model, layout, path=path.name, pad_to_multiple_of=multiple if isinstance(multiple, int) else None
    )
    around.callback(module.release)
    pad_token_id: int = unwrapped(model).config.get_text_config().pad_token_id
    max_tokens = decide_budget(
        Probe(module, precision, rank.device, pad_token_id),
        job.train_set.sample,
        config,
        job.max_tokens,
        output_dir=job.output_dir,
        rank=rank.index,
        num_ranks=rank.count,
    )
    engine = build_engine(config, module, rank, precision, num_steps, job.optimizer, job.optimizers)
    if rank.count == 1:
        around.callback(engine.release)
    return RankModel(module, layout, pad_token_id, attention_weight, max_tokens, engine, export)
