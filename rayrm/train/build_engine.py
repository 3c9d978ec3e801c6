"""The engine that a config asks for: PyTorch, or DeepSpeed, which is imported then only."""

from __future__ import annotations

from rayrm.config import RewardConfig
from rayrm.model.forward import PackedScorer
from rayrm.train.engine import Engine, TorchEngine
from rayrm.train.optimizer import Optimizers, OptimizerSpec, make_optimizer, make_scheduler
from rayrm.train.precision import Precision
from rayrm.train.rank import Rank


def build_engine(
    config: RewardConfig,
    module: PackedScorer,
    rank: Rank,
    precision: Precision,
    num_steps: int,
    wanted: OptimizerSpec | None,
    given: Optimizers | None = None,
) -> Engine:
    """`wanted`: the optimizer, where it is not the one that `config` names; `given`: one that is there."""
    optimizer, scheduler = given or (make_optimizer(module, config, wanted), None)
    scheduler = scheduler or make_scheduler(optimizer, config, num_steps)
    if config.zero_stage is None and config.deepspeed is None:
        return TorchEngine(
            module,
            optimizer,
            scheduler,
            device=rank.device,
            world_size=rank.count,
            max_grad_norm=config.max_grad_norm,
            precision=precision,
            skips_nonfinite=config.nonfinite_loss == "skip",
        )
    from rayrm.train.zero import DeepSpeedEngine
    from rayrm.train.zero_config import deepspeed_config

    return DeepSpeedEngine(
        module,
        optimizer,
        scheduler,
        device=rank.device,
        world_size=rank.count,
        max_grad_norm=config.max_grad_norm,
        settings=deepspeed_config(config, precision, rank.count),
        skips_nonfinite=config.nonfinite_loss == "skip",
    )
