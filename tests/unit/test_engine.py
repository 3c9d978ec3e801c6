"""An engine's step is one optimizer's step: on any number of ranks, and none where gradients overflowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from rayrm.config import Optimizer, RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import ConfigError
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout
from rayrm.train.checkpoint import ENGINE_DIR, TrainState
from rayrm.train.checkpoint_writer import Snapshot
from rayrm.train.engine import TorchEngine
from rayrm.train.optimizer import check_optimizers, make_optimizer, make_scheduler
from rayrm.train.step import train_step
from tests.numerics.ranks import tokenized
from tests.tiny import tiny_model
from tests.whole_checkpoint import writer_of

CPU = torch.device("cpu")


def engine_of(
    world_size: int = 1, precision: Any = "fp32", given: Any = None, **settings: Any
) -> TorchEngine:
    """`given`: the model's parameters -> an optimizer."""
    config = RewardConfig(**{"bf16": False, "max_grad_norm": 0.0, **settings})
    module = PackedScorer(tiny_model(seed=1), Layout("shared"))
    optimizer = make_optimizer(module, config, None) if given is None else given(module.model)
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


def of_the_head(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.score.parameters(), lr=0.0, momentum=0.9)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_an_optimizer_does_not_hold_are_of_one_step_too(precision: str) -> None:
    engine = engine_of(precision=precision, given=of_the_head)
    batch = pack_rows(tokenized(4), 0)
    # Weights stay where they are, and so does the gradient.
    norms = [float(train_step(engine, [batch], 4).grad_norm) for _ in range(3)]
    assert norms[1:] == norms[:1] * 2
    whole = float(train_step(engine_of(precision=precision), [batch], 4).grad_norm)
    assert norms[0] == pytest.approx(whole, rel=1e-6)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def of_some(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Without the head, and with an embedding that is not trained."""
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    rest = [parameter for name, parameter in model.named_parameters() if "score" not in name]
    return torch.optim.SGD(rest, lr=0.1, momentum=0.9)


def test_a_run_with_an_optimizer_over_some_of_the_parameters_is_resumed(tmp_path: Path) -> None:
    batch = pack_rows(tokenized(4), 0)
    engine = engine_of(given=of_some)
    train_step(engine, [batch], 4)
    writer = writer_of(tmp_path)
    writer.save(TrainState(step=1), lambda host: Snapshot(engine.state(host)))
    writer.wait()
    writer.close()
    resumed = engine_of(given=of_some)
    resumed.load(tmp_path / "checkpoint-1" / ENGINE_DIR)
    for going_on in (engine, resumed):
        train_step(going_on, [batch], 4)
    assert all(equal(weights(engine), weights(resumed)))


def test_a_class_of_optimizers_is_given_parameters_and_names_none() -> None:
    spec: Any = (torch.optim.SGD, {"lr": 0.1, "params": []})
    with pytest.raises(ConfigError, match=r"`optimizer_cls_and_kwargs` has `params`.* `optimizers`"):
        check_optimizers((None, None), spec, RewardConfig(), num_workers=0, has_adapter=False)


# Of the tiny model's weights: which ranks have a gradient of it.
PARTS = {"model.norm.weight": (), "model.layers.0.mlp.up_proj.weight": (1,)}


def _step_on_a_rank(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    engine = engine_of(2, optim="adamw_torch", weight_decay=0.1, learning_rate=0.1)
    # Norms have no weight decay in transformers' groups: here all have.
    for group in engine.optimizer.param_groups:
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


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "adamw_torch": (torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-7}, None),
    "adamw_torch_fused": (torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-7}, None),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "momentum=0.9,nesterov=true"),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}, "lr_decay=0.1"),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.5}, "alpha=0.9,momentum=0.5"),
}
NUM_STEPS = 4


def rows_of(step: int) -> list[TokenizedRow]:
    """Other rows each step: embedding rows fall out of use and come back."""
    return tokenized(12)[4 * (step % 3) : 4 * (step % 3) + 4]


def plain_weights(optim: str, weight_decay: float) -> dict[str, torch.Tensor]:
    """The same steps by the stock model, text by text, and torch's own optimizer over dense gradients."""
    model = tiny_model(seed=1)
    made, options, _ = OPTIMIZERS[optim]
    decays = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = made(groups, lr=1e-3, **options)
    for step in range(NUM_STEPS):
        for row in rows_of(step):
            better, worse = (model(input_ids=torch.tensor(ids[None])).logits[0, 0] for ids in row.sequences)
            loss = -torch.nn.functional.logsigmoid(better - worse - row.margin) / 4
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_takes_the_steps_of_torch_over_dense_gradients(
    optim: str, weight_decay: float
) -> None:
    """The embedding's buffer is zero outside the rows in use, where decay and moments still act."""
    engine = engine_of(
        optim=optim,
        optim_args=OPTIMIZERS[optim][2],
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-7,
        weight_decay=weight_decay,
    )
    for step in range(NUM_STEPS):
        train_step(engine, [pack_rows(rows_of(step), 0)], 4)
    start = {name: value.detach() for name, value in tiny_model(seed=1).named_parameters()}
    plain = plain_weights(optim, weight_decay)
    for name, value in weights(engine).items():
        moved = plain[name] - start[name]
        # Sums in another order differ by 1e-6; Adam and RMSprop divide small gradients by their own size.
        assert float((value - plain[name]).norm()) <= 1e-3 * float(moved.norm()), name


def test_every_supported_optimizer_is_compared() -> None:
    assert set(OPTIMIZERS) == set(get_args(Optimizer))
