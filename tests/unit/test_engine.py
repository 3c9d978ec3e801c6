"""An engine's step is one optimizer's step: on any number of ranks, and none where gradients overflowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout
from rayrm.train.engine import TorchEngine
from rayrm.train.optimizer import make_optimizer, make_scheduler
from rayrm.train.step import train_step
from tests.numerics.ranks import tokenized
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def engine_of(world_size: int = 1, precision: Any = "fp32", **settings: Any) -> TorchEngine:
    config = RewardConfig(**{"bf16": False, "max_grad_norm": 0.0, **settings})
    module = PackedScorer(tiny_model(seed=1), Layout("shared"))
    optimizer = make_optimizer(module, config, None)
    return TorchEngine(
        module,
        optimizer,
        make_scheduler(optimizer, config, 10),
        device=CPU,
        world_size=world_size,
        max_grad_norm=config.max_grad_norm,
        precision=precision,
    )


def weights(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.model.named_parameters()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(value, two[name]) for name, value in one.items()]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_step_whose_gradients_overflow_moves_neither_weights_nor_schedule(optim: str) -> None:
    engine = engine_of(precision="fp16", optim=optim)
    batch = pack_rows(tokenized(4), 0)
    before, rate = weights(engine), engine.learning_rate()
    overflowing = engine.module.model.score.weight.register_hook(lambda gradient: gradient * torch.inf)
    train_step(engine, [batch], 4)
    assert all(equal(before, weights(engine)))
    assert engine.learning_rate() == rate
    overflowing.remove()
    train_step(engine, [batch], 4)
    # SGD's step is below the last digit of a norm's weights.
    assert sum(equal(before, weights(engine))) <= 5
    # Linear over 10 steps, of which this is the first.
    assert engine.learning_rate() == pytest.approx(0.9 * rate)


def test_a_loss_that_is_scaled_gives_the_gradient_norm_of_one_that_is_not() -> None:
    batch = pack_rows(tokenized(4), 0)
    plain, scaled = (train_step(engine_of(precision=p), [batch], 4).grad_norm for p in ("fp32", "fp16"))
    # Ten bits of fp16 keep three digits; the scale is 65536.
    assert float(scaled) == pytest.approx(float(plain), rel=1e-2)


# Of the tiny model's weights: which ranks have a gradient of it.
PARTS = {"model.norm.weight": (), "model.layers.0.mlp.up_proj.weight": (1,)}


def _step_on_a_rank(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    engine = engine_of(2, optim="adamw_torch", weight_decay=0.1, learning_rate=0.1)
    # Norms have no weight decay in transformers' groups: here all have.
    for group in engine._optimizer.param_groups:
        group["weight_decay"] = 0.1
    before = weights(engine)
    for _ in range(2):
        for name, parameter in engine.module.model.named_parameters():
            if "embed_tokens" not in name and rank in PARTS.get(name, (0, 1)):
                parameter.grad = torch.full_like(parameter, 2.0)
        engine.module.model.get_input_embeddings()(torch.tensor([5])).sum().backward()
        norm = engine.step()
    torch.save({"before": before, "after": weights(engine), "norm": norm}, root / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_a_weight_without_a_gradient_on_any_rank_is_left_alone_as_on_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_step_on_a_rank, (tmp_path,), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(equal(one["after"], two["after"]))
    assert float(one["norm"]) == float(two["norm"])
    still = [name for name, value in one["before"].items() if torch.equal(value, one["after"][name])]
    assert still == ["model.norm.weight"]
    # The mean of a gradient of 2 on one rank and of none on the other is 1, of two ranks' is 2.
    half = one["before"]["model.layers.0.mlp.up_proj.weight"].numel()
    embedding = one["before"]["model.embed_tokens.weight"].shape[1]
    rest = sum(value.numel() for name, value in one["before"].items() if "embed" not in name) - half
    rest -= one["before"]["model.norm.weight"].numel()
    assert float(one["norm"]) == pytest.approx((half + embedding + 4 * rest) ** 0.5, rel=1e-5)
