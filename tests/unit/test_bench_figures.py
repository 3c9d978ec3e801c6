"""The benchmarks' arithmetic, beside what torch counts and what can be counted by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayrm.data.packing import PackedBatch, pack_texts
from rayrm.data.tokenize import TokenizedRow
from tests.tiny import tiny_model

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import measuring

    return measuring


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import train

    return train


def one_text(length: int) -> PackedBatch:
    return pack_texts([np.arange(3, 3 + length, dtype=np.int32)], 0)


def counted(length: int) -> dict[str, int]:
    """FLOPs of a stock forward and backward over one text: of its weights, and of full attention."""
    model = tiny_model()
    model.config._attn_implementation = "eager"
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids).last_hidden_state
        # The head at every token, as transformers' classifier has it.
        model.score(hidden).sum().backward()
    found = {str(name).removeprefix("aten."): flops for name, flops in counter.flop_counts["Global"].items()}
    return {"weights": found["mm"], "attention": found["bmm"]}


def test_a_training_pass_costs_what_torch_counts(measuring: ModuleType) -> None:
    length = 40
    model = tiny_model()
    cost = measuring.ModelCost.of(model)
    by_torch = counted(length)
    no_attention = cost.training([], length)
    # The definition is by parameters, and of those the norms' multiply no matrices.
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert no_attention == by_torch["weights"] + 6 * norms * length
    # Torch counts every (query, key) pair of every layer; seen are the causal ones, in the last layer the
    # pooled token's.
    layers = model.config.num_hidden_layers
    a_pair = by_torch["attention"] / (layers * length**2)
    seen = (layers - 1) * length * (length + 1) // 2 + length
    assert cost.training([one_text(length)], length) - no_attention == a_pair * seen
    assert cost.scoring([one_text(length)], length) == (no_attention + a_pair * seen) / 3


def test_what_is_executed_leaves_out_the_last_layer_of_tokens_that_are_not_pooled(
    measuring: ModuleType,
) -> None:
    model = tiny_model()
    cost, batch = measuring.ModelCost.of(model), one_text(40)
    last = model.model.layers[-1]
    spared = [
        last.self_attn.o_proj.weight,
        last.mlp.gate_proj.weight,
        last.mlp.up_proj.weight,
        last.mlp.down_proj.weight,
        last.input_layernorm.weight,
        last.post_attention_layernorm.weight,
    ]
    queries = last.self_attn.q_proj.weight.numel()
    # 39 of 40 tokens: nothing of these, and of the queries the forward alone. The pooled token's own are
    # computed twice: among all tokens', and in the pass over the pooled.
    less = 39 * (6 * sum(p.numel() for p in spared) + 4 * queries) - 2 * queries
    assert cost.training([batch], 40) - cost.executed([batch]) == less


def test_the_peak_is_two_flops_a_product_over_the_best_time(
    measuring: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.5, 0.25, 0.5])
    monkeypatch.setattr(measuring.Stopwatch, "stop", lambda self: next(seconds))
    assert measuring.matmul_peak(CPU, "fp32", repeats=3) == 2 * 2048**3 / 0.25


def test_pairs_a_second_leave_out_the_warm_up(train: ModuleType) -> None:
    timed = [train.TimedStep(seconds, 0.0, 0.0) for seconds in (9.0, 9.0, 0.5, 1.5)]
    assert train.pairs_per_s(timed, batch=8) == 16 / 2


def test_padded_tokens_are_both_sides_at_the_steps_longest(train: ModuleType) -> None:
    def pair(chosen: int, rejected: int) -> TokenizedRow:
        return TokenizedRow.pair(*(np.arange(3, 3 + n, dtype=np.int32) for n in (chosen, rejected)))

    assert train.padded_tokens([[pair(3, 7), pair(2, 2)], [pair(4, 1)]]) == 4 * 7 + 2 * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [({"attn": "varlen"}, "--attn varlen needs a GPU"), ({"dtype": "bf16"}, "--dtype bf16 means nothing")],
)
def test_what_a_cpu_cannot_do_is_refused(
    measuring: ModuleType, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measuring, "bf16_usable", lambda use_cpu: (False, "no instructions"))
    arguments = argparse.Namespace(**{"threads": None, "dtype": "fp32", "attn": None} | given)
    with pytest.raises(SystemExit, match=said):
        measuring.device_of(arguments)


def test_what_a_user_can_mend_is_said_without_a_stack_trace(measuring: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(json=None, data=str(tmp_path / "none.jsonl"))
    with pytest.raises(SystemExit, match=r"none\.jsonl does not exist"):
        measuring.run_bench(arguments, lambda given: {"rows": measuring.read_pairs(given.data)}, print)
