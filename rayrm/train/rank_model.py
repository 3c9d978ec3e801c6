"""What a rank trains: the model, how its rows are laid out and attend, token budget, engine and export."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import torch

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import resolved_stage
from rayrm.model.attention_path import choose_path
from rayrm.model.cost import attention_weight_of
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout, choose_layout, unwrapped
from rayrm.model.offload import offload_activations
from rayrm.objective import Objective
from rayrm.train.budget import decide_budget
from rayrm.train.build import build_model, trains_tokens
from rayrm.train.build_engine import build_engine
from rayrm.train.engine import Engine
from rayrm.train.export import ModelExport
from rayrm.train.footprint import Probe
from rayrm.train.job import TrainJob
from rayrm.train.positions import check_positions, check_rope
from rayrm.train.precision import autocast_dtype, resolve_precision
from rayrm.train.rank import Hosts, Rank
from rayrm.train.sequence import check_layout, sequence_part
from rayrm.train.sharded_export import ShardExport, shards_files
from rayrm.train.zero_init import builds_in_parts, in_parts, whole_in_turn

logger = logging.getLogger("rayrm.train")
_EVAL_ROWS = RewardConfig.per_device_eval_batch_size


@dataclass(frozen=True, slots=True)
class RankModel:
    """`export`: of a rank that saves the model, or a part of it; None on others."""

    module: PackedScorer
    layout: Layout
    pad_token_id: int
    attention_weight: float
    max_tokens: int
    engine: Engine
    export: ModelExport | ShardExport | None


def _export(model: torch.nn.Module, job: TrainJob, rank: Rank) -> ModelExport | ShardExport | None:
    shards = shards_files(job.config, model, rank.count)
    if not shards and rank.index > 0:
        return None
    export = ModelExport(model, job.tokenizer, job.text_form, Objective.of(job.config).settings)
    return ShardExport(export, rank.index, rank.count) if shards else export


def build_rank_model(
    job: TrainJob, rank: Rank, hosts: Hosts, num_steps: int, around: contextlib.ExitStack
) -> RankModel:
    """Seed before calling. `around` gives a model that was given back as it was, when it ends."""
    config = job.config

    def say(message: str) -> None:
        if rank.index == 0:
            logger.info("%s", message)

    name = job.source.model if isinstance(job.source.model, str) and job.built is None else None
    tokens = resolved_stage(config) == 3 and trains_tokens(job.source, config, job.tokenizer)
    parted = builds_in_parts(name, config, rank, hosts, say, trains_tokens=tokens)
    with in_parts(config, rank.device) if parted else contextlib.nullcontext():
        built = job.built if job.built is not None else build_model(job.source, config, job.tokenizer)
        model = built.to(rank.device)
    longest = max(int(s.index.lengths.max()) for s in (job.train_set.sample, *job.eval_sets.values()))
    check_positions(unwrapped(model), longest, say)
    check_rope(unwrapped(model), longest, config, rank.count)
    with whole_in_turn(model) if parted else contextlib.nullcontext():
        layout = choose_layout(model, share_prefix=config.share_prefix, longest=longest)
    say(str(layout))
    check_layout(layout, config)
    if config.per_device_eval_batch_size != _EVAL_ROWS and job.metrics is None:
        say(
            f"`per_device_eval_batch_size` ({config.per_device_eval_batch_size}) sets nothing here: "
            "evaluation goes by tokens (`max_tokens_per_microbatch`), and its metrics depend on neither"
        )
    precision = resolve_precision(config, rank.device)
    path = choose_path(model, rank.device, autocast_dtype(precision))
    if layout.name != "padded":
        say(str(path))
    attention_weight = attention_weight_of(model)
    export = _export(model, job, rank)
    multiple = config.pad_to_multiple_of
    module = PackedScorer(
        model,
        layout,
        path=path.name,
        pad_to_multiple_of=multiple if isinstance(multiple, int) else None,
        part=sequence_part(config, model, rank),
    )
    around.callback(module.release)
    if config.activation_offloading and rank.device.type == "cpu":
        say("`activation_offloading` (True) moves nothing: on a CPU activations are in the host's memory")
    elif config.activation_offloading:
        around.callback(offload_activations(module))
    pad_token_id: int = unwrapped(model).config.get_text_config().pad_token_id
    max_tokens = decide_budget(
        Probe(module, precision, rank.device, pad_token_id),
        job.train_set.sample,
        config,
        job.max_tokens,
        output_dir=job.output_dir,
        rank=rank.index,
        num_ranks=rank.count,
        measures=not parted,
    )
    engine = build_engine(config, module, rank, precision, num_steps, job.optimizer, job.optimizers)
    if rank.count == 1:
        around.callback(engine.release)
    return RankModel(module, layout, pad_token_id, attention_weight, max_tokens, engine, export)
