"""`TorchEngine` updates as torch's optimizers do, and leaves alone what a step did not reach."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.model.attention import AttentionPath
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import Layout
from rayrm.train.build import ModelSource, build_model
from rayrm.train.engine import TorchEngine
from rayrm.train.optimizer import make_optimizer, make_scheduler
from rayrm.train.precision import Precision
from rayrm.train.step import train_step
from tests.numerics.ranks import tokenized
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
STEPS = 4


def engine_of(
    model: torch.nn.Module,
    config: RewardConfig,
    *,
    world_size: int = 1,
    precision: Precision = "fp32",
    layout: Any = "shared",
    path: AttentionPath = "loop",
    device: torch.device = CPU,
) -> TorchEngine:
    scorer = PackedScorer(model, Layout(layout), path=path)
    optimizer = make_optimizer(scorer, config)
    scheduler = make_scheduler(optimizer, config, 10)
    return TorchEngine(
        scorer,
        optimizer,
        scheduler,
        device=device,
        world_size=world_size,
        max_grad_norm=config.max_grad_norm,
        precision=precision,
    )


def take_step(engine: TorchEngine, number: int) -> None:
    rows = tokenized(2 * STEPS)[2 * number : 2 * number + 2]
    engine.backward(engine.scores(to_device(pack_rows(rows, 0), CPU, engine.module.path)).square().sum())
    engine.step()


@pytest.mark.parametrize(
    ("optim", "plain"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_every_optim_takes_the_trajectory_of_torchs_own(optim: str, plain: Any) -> None:
    """On a model whose embedding has a dense gradient, as torch makes it; decay moves rows nobody touched."""
    config = RewardConfig(bf16=False, optim=optim, learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.0)
    model, other = tiny_model(seed=1), tiny_model(seed=1)
    engine = engine_of(model, config)
    undecayed = [p for name, p in other.named_parameters() if "norm" in name or name.endswith("bias")]
    decayed = [p for p in other.parameters() if all(p is not q for q in undecayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    reference = plain(groups, lr=0.01)
    schedule = make_scheduler(reference, config, 10)
    scorer = PackedScorer(other, Layout("shared"))
    for number in range(STEPS):
        take_step(engine, number)
        rows = tokenized(2 * STEPS)[2 * number : 2 * number + 2]
        scorer(to_device(pack_rows(rows, 0), CPU, scorer.path)).square().sum().backward()
        reference.step()
        schedule.step()
        reference.zero_grad()
    engine.release()
    start = tiny_model(seed=1).state_dict()
    for name, parameter in model.named_parameters():
        # float32, one implementation fused and the other not: last digits.
        moved = (other.state_dict()[name] - start[name]).norm()
        assert (parameter - other.state_dict()[name]).norm() <= 1e-4 * moved, name
        assert moved > 0, name


def test_a_skipped_update_does_not_move_the_schedule() -> None:
    """fp16: an overflow lowers the loss scale; neither weights nor learning rate move."""
    config = RewardConfig(bf16=False, learning_rate=0.01, lr_scheduler_type="linear")
    model = tiny_model(seed=1)
    engine = engine_of(model, config, precision="fp16")
    before = copy.deepcopy(model.state_dict())
    rate = engine.learning_rate()
    batch = torch.zeros((), requires_grad=True)
    engine.backward(batch * 1.0)  # the scaler wants to have scaled something
    model.score.weight.grad = torch.full_like(model.score.weight, torch.inf)
    engine.step()
    assert engine.learning_rate() == rate
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.score.weight.grad = torch.ones_like(model.score.weight)
    engine.step()
    assert engine.learning_rate() < rate
    assert not torch.equal(model.score.weight, before["score.weight"])


def rank_with_an_unused_weight(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model: Any = tiny_model(seed=1)
    model.unused = torch.nn.Parameter(torch.ones(3))
    model.on_rank_one = torch.nn.Parameter(torch.ones(3))
    config = RewardConfig(bf16=False, optim="sgd", learning_rate=0.5, weight_decay=0.1, max_grad_norm=0.0)
    engine = engine_of(model, config, world_size=2)
    if rank == 1:
        engine.backward(model.on_rank_one.sum())
    take_step(engine, rank)
    torch.save({name: value.detach() for name, value in model.named_parameters()}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_a_weight_that_no_rank_used_stays_and_one_that_one_rank_used_moves_on_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_with_an_unused_weight, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for weights in (one, other):
        assert torch.equal(weights["unused"], torch.ones(3))
        # lr 0.5 x (half the gradient of one rank + decay of 0.1).
        torch.testing.assert_close(weights["on_rank_one"], torch.full((3,), 1 - 0.5 * (0.5 + 0.1)))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("path", ["varlen", "flex", "loop"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_step_never_makes_the_host_wait_for_a_gpu(
    layout: str, path: AttentionPath, checkpointing: bool
) -> None:
    """Padded rows are left out: transformers' own forward asks there whether the mask has padding at all."""
    device = torch.device("cuda")
    config = RewardConfig(bf16=True, gradient_checkpointing=checkpointing)
    model = build_model(ModelSource(tiny_model(hidden_size=64)), config, tiny_tokenizer()).to(device)
    engine = engine_of(model, config, precision="bf16", layout=layout, path=path, device=device)
    batches = [pack_rows(tokenized(8)[n : n + 4], 0, share=layout == "shared") for n in (0, 4)]
    for _ in range(2):  # kernels are compiled and workspaces taken once
        train_step(engine, batches, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(engine, batches, 8, center_rewards_coefficient=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
