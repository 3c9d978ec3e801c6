"""The token budget is what memory has room for: measured, coarse, kept, and without a trace in the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import choose_layout
from rayrm.runfile import Run, dump_run, read_run
from rayrm.train.budget import choose_budget, decide_budget
from rayrm.train.build import ModelSource, build_model
from rayrm.train.footprint import Probe
from rayrm.train.peak_memory import peak_bytes
from rayrm.train.precision import in_precision
from rayrm.train.rundir import RunStart, claim, examine
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
GIB = 2**30
SHARE = 0.6


def pair(prefix: int, tail: int, seed: int = 0) -> TokenizedRow:
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 390, prefix)
    sides = [np.concatenate([shared, [3 + side], rng.integers(3, 390, tail - 1)]) for side in (0, 1)]
    return TokenizedRow.pair(*(side.astype(np.int32) for side in sides))


ROWS = [pair(10, 5), pair(120, 60, seed=1), pair(40, 10, seed=2)]
LONGEST = 240


def probe_of(config: RewardConfig, *, padded: bool = False, **shape: Any) -> Probe:
    model = tiny_model(hidden_size=64, num_hidden_layers=4, **shape)
    model.config.alibi = padded  # Llama does not read this flag; the layout does
    model = build_model(ModelSource(model), config, tiny_tokenizer())
    return Probe(PackedScorer(model, choose_layout(model, longest=512), path="tiled"), "fp32", CPU, 0)


def config_of(**settings: Any) -> RewardConfig:
    return RewardConfig(**{"bf16": False, "gradient_checkpointing": False, **settings})


def chosen(
    config: RewardConfig, free: int | None, num_ranks: int = 1, rows: Sequence[TokenizedRow] = ROWS
) -> tuple[int, list[str]]:
    said: list[str] = []
    whole = TokenizedSet.from_rows(rows)
    budget = choose_budget(probe_of(config), whole, config, free=free, num_ranks=num_ranks, say=said.append)
    return budget, said


def state_bytes(probe: Probe) -> int:
    """Gradients, two moments, one copy: float32."""
    return 4 * 4 * sum(p.numel() for p in probe.module.parameters())


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "stored": {},
    "recomputed": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("padded", [False, True], ids=["shared", "padded"])
def test_the_footprint_of_one_row_tells_that_of_many(checkpointing: str, padded: bool) -> None:
    probe = probe_of(config_of(**CHECKPOINTING[checkpointing]), padded=padded)
    footprint = probe.footprint(ROWS[1])
    many = pack_rows([pair(120, 60, seed=seed) for seed in range(2, 10)], 0, share=not padded)
    batch = to_device(many, CPU, probe.module.path)
    for parameter in probe.module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        torch.autograd.backward(in_precision(probe.module, batch, "fp32").sum())

    peak = peak_bytes(run, CPU)
    # One row's tokens attend to a larger part of their batch, so that it may tell somewhat too much.
    assert 0.95 * peak <= footprint.of(many.num_tokens) <= 1.3 * peak


def test_recomputing_layers_is_seen_to_take_less() -> None:
    stored, recomputed = (
        probe_of(config_of(gradient_checkpointing=checkpointing)).footprint(ROWS[1]).per_token
        for checkpointing in (False, True)
    )
    assert recomputed < 0.6 * stored


def test_the_budget_is_the_largest_power_of_two_that_fits_beside_gradients_and_optimizer() -> None:
    config = config_of()
    probe = probe_of(config)
    footprint = probe.footprint(ROWS[1])
    free = state_bytes(probe) + int(footprint.of(3000) / SHARE)
    budget, said = chosen(config, free)
    assert budget == 2048
    assert footprint.of(2048) <= SHARE * (free - state_bytes(probe)) < footprint.of(4096)
    assert len(said) == 1
    assert "max_tokens_per_microbatch: 2048 tokens (measured:" in said[0]
    assert f"the longest row has {LONGEST}" in said[0]


def test_ranks_that_share_the_state_have_room_for_more() -> None:
    footprint = probe_of(config_of()).footprint(ROWS[1])
    free = state_bytes(probe_of(config_of())) + int(footprint.of(1000) / SHARE)
    assert chosen(config_of(), free, 4)[0] == 512
    assert chosen(config_of(zero_stage=2), free, 4)[0] == 1024
    assert chosen(config_of(deepspeed={"zero_optimization": {"stage": 2}}), free, 4)[0] == 1024
    assert chosen(config_of(deepspeed={"zero_optimization": {"stage": 0}}), free, 4)[0] == 512


def test_with_much_memory_the_budget_is_capped_and_with_unknown_memory_too() -> None:
    assert chosen(config_of(), 1000 * GIB)[0] == 8192
    budget, said = chosen(config_of(), None)
    assert budget == 8192
    assert "free memory is not known" in said[0]


def test_a_row_is_never_left_out_and_what_may_not_fit_is_said() -> None:
    budget, said = chosen(config_of(), 1000)
    assert budget == LONGEST
    assert f"the longest row ({LONGEST} tokens) takes" in said[1]
    assert "lower `max_length`" in said[1]


def test_checkpointing_that_is_not_needed_is_said_with_what_to_type() -> None:
    config = config_of(gradient_checkpointing=True)
    _, said = chosen(config, 100 * GIB)
    assert "gradient checkpointing is not needed" in said[-1]
    assert "`gradient_checkpointing=false`" in said[-1]
    assert not any("not needed" in line for line in chosen(config_of(), 100 * GIB)[1])


MANY = [*ROWS, *(pair(100, 50, seed=seed) for seed in range(3, 20))]
STEP = {"gradient_checkpointing": True, "per_device_train_batch_size": 20}


def peak_of(rows: Sequence[TokenizedRow], config: RewardConfig) -> int:
    """The real peak of a micro-batch beside gradients."""
    probe = probe_of(config)
    batch = to_device(pack_rows(rows, 0), CPU, probe.module.path)
    for parameter in probe.module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        torch.autograd.backward(in_precision(probe.module, batch, "fp32").sum())

    return peak_bytes(run, CPU)


def free_for(tokens: int, *, checkpointing: bool) -> int:
    """As much as leaves room for a micro-batch of so many tokens."""
    probe = probe_of(config_of(gradient_checkpointing=checkpointing))
    return state_bytes(probe) + int(probe.footprint(ROWS[1]).of(tokens, 2) / SHARE)


def not_needed(said: list[str]) -> list[str]:
    return [line for line in said if "gradient checkpointing is not needed" in line]


def test_checkpointing_is_not_needed_where_a_whole_step_fits_though_the_budget_would_not() -> None:
    config = config_of(gradient_checkpointing=True)
    free = free_for(340, checkpointing=False)
    budget, said = chosen(config, free)
    # Three rows of 320 tokens in all; without recomputing the budget's tokens would not fit.
    assert budget == 512
    (line,) = not_needed(said)
    assert "a micro-batch of 320 tokens" in line
    assert line.endswith("`gradient_checkpointing=false`")
    assert peak_of(ROWS, config_of()) <= SHARE * (free - state_bytes(probe_of(config)))


def test_the_budget_that_makes_checkpointing_needless_is_named() -> None:
    config = config_of(**STEP)
    free = free_for(1100, checkpointing=False)
    budget, said = chosen(config, free, rows=MANY)
    assert budget >= 2048
    (line,) = not_needed(said)
    assert "not needed with `max_tokens_per_microbatch=1024`" in line
    assert "the cut cannot change the loss" in line
    assert line.endswith("`gradient_checkpointing=false max_tokens_per_microbatch=1024`")
    # What is typed then is so: the budget that is measured without is the one that is named.
    assert chosen(config_of(per_device_train_batch_size=20), free, rows=MANY)[0] == 1024


def test_nothing_is_said_where_no_row_fits_without_checkpointing() -> None:
    # A power of two below the longest row would be no budget.
    budget, said = chosen(config_of(**STEP), free_for(230, checkpointing=False), rows=MANY)
    assert budget >= LONGEST
    assert not_needed(said) == []


@pytest.mark.parametrize(
    ("given", "says"), [(1024, "`gradient_checkpointing=false`"), (4096, "max_tokens_per_microbatch=1024`")]
)
def test_of_a_budget_that_is_given_it_is_said_too(
    given: int, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**STEP, max_tokens_per_microbatch=given)
    monkeypatch.setattr("rayrm.train.budget.free_bytes", lambda device: free_for(1100, checkpointing=False))
    decide = partial(decide_budget, probe_of(config), TokenizedSet.from_rows(MANY), config, given)
    with caplog.at_level(logging.INFO, "rayrm.train"):
        assert decide(output_dir=tmp_path, rank=1, num_ranks=1) == given
        assert caplog.text == ""
        assert decide(output_dir=tmp_path, rank=0, num_ranks=1) == given
    (line,) = not_needed(caplog.messages)
    assert line.endswith(says)


def test_many_short_rows_stay_within_the_room() -> None:
    """The last layer's mask, of every score and token, grows with their product."""
    rows = [ROWS[1], *(pair(6, 2, seed=seed) for seed in range(2, 402))]
    config = config_of(per_device_train_batch_size=len(rows))
    footprint = probe_of(config).footprint(ROWS[1])
    free = free_for(4200, checkpointing=False)
    room = SHARE * (free - state_bytes(probe_of(config)))
    # By tokens alone the whole step would fit.
    assert footprint.of(4096) <= room < peak_of(rows, config)
    budget, _ = chosen(config, free, rows=rows)
    index = TokenizedSet.from_rows(rows).index
    (plan,) = plan_step(index.costs(share=True), num_ranks=1, max_tokens=budget)
    peaks = [peak_of([rows[n] for n in microbatch.rows], config) for microbatch in plan]
    assert max(peaks) <= room
    # And it is no smaller than it must be: twice as much would not be sure to fit.
    assert max(peaks) > room / 4


def test_steps_of_few_rows_do_not_pay_for_a_mask_they_cannot_have() -> None:
    rows = [ROWS[1], *(pair(6, 2, seed=seed) for seed in range(2, 402))]
    free = free_for(4200, checkpointing=False)
    assert chosen(config_of(per_device_train_batch_size=4), free, rows=rows)[0] == 4096


def test_the_probe_leaves_no_trace() -> None:
    probe = probe_of(config_of(gradient_checkpointing=True))
    module = probe.module
    kept = torch.ones_like(module.model.score.weight)
    module.model.score.weight.grad = kept
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    choose_budget(
        probe, TokenizedSet.from_rows(ROWS), config_of(), free=100 * GIB, num_ranks=1, say=lambda _: None
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert gradients == {"model.score.weight": kept}
    assert bool((kept == 1).all())
    checkpointed = [getattr(layer, "gradient_checkpointing", None) for layer in module.model.model.layers]
    assert checkpointed == [True, True, True, False]  # the last layer stores: `last_layer.py`


def begin(directory: Path, config: RewardConfig) -> None:
    run = Run(model=ModelConfig("org/base"), data=DataConfig(train="in memory"), reward=config)
    claim(directory, {"seed": 1}, None, dump_run(run))


def test_a_chosen_budget_is_written_and_never_chosen_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of()
    begin(tmp_path, config)
    decide = partial(
        decide_budget,
        probe_of(config),
        TokenizedSet.from_rows(ROWS),
        config,
        output_dir=tmp_path,
        num_ranks=1,
    )
    with caplog.at_level(logging.INFO, "rayrm.train"):
        budget = decide(None, rank=0)
    assert "measured" in caplog.text
    assert json.loads((tmp_path / "identity.json").read_text()) == {
        "identity": {"seed": 1},
        "max_tokens_per_microbatch": budget,
    }
    written = read_run(tmp_path / "run.toml")
    assert written.reward.max_tokens_per_microbatch == budget
    assert written.reward.learning_rate == config.learning_rate
    assert examine(tmp_path, {"seed": 1}, resume=True) == RunStart(None, budget)
    # As if it had been chosen on a machine with less memory.
    kept = json.loads((tmp_path / "identity.json").read_text())
    (tmp_path / "identity.json").write_text(json.dumps({**kept, "max_tokens_per_microbatch": 512}))
    caplog.clear()
    with caplog.at_level(logging.INFO, "rayrm.train"):
        assert decide(None, rank=0) == 512
    assert "measured" not in caplog.text


def test_a_budget_that_is_set_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(max_tokens_per_microbatch=300)
    begin(tmp_path, config)
    with caplog.at_level(logging.INFO, "rayrm.train"):
        budget = decide_budget(
            probe_of(config),
            TokenizedSet.from_rows(ROWS),
            config,
            300,
            output_dir=tmp_path,
            rank=0,
            num_ranks=1,
        )
    assert budget == 300
    assert "max_tokens_per_microbatch" not in caplog.text
