"""Law 1 where ranks compute rows together: losses, gradient norms and weights are one rank's.

The reference is the stock padded forward on one rank, with plain PyTorch; SGD without clipping, which hides
no factor. Every cell cuts its steps into several micro-batches, on four ranks one row each, with dummies.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel

from rayrm.data.tokenize import TokenizedRow
from rayrm.train.build import ModelSource
from rayrm.train.peak_memory import peak_bytes
from rayrm.train.row_log import read_row_log
from rayrm.train.worker import train_rank
from tests.cells import EVERY_CELL, cells_of
from tests.numerics.ranks import GATHERED, Outcome, Variant, job_of, outcome_of, tokenized, train
from tests.numerics.test_same_gradients import OPTIMIZERS, TOLERANCE, differences, untimed
from tests.numerics.test_soundness import POISON
from tests.tiny import tiny_llama_config, tiny_model

# One fixture trains all cells.
pytestmark = pytest.mark.timeout(1800)
# An epoch, whose last step has two rows.
NUM_ROWS, ROWS_PER_STEP, NUM_STEPS = 38, 4, 10
ENGINES: dict[str, dict[str, Any]] = {"torch": {}, "zero2": {"zero_stage": 2}, "zero3": GATHERED}
CELLS = cells_of(
    itertools.product(ENGINES, (2, 4), (False, True)),
    [("torch", 2, False), ("zero2", 2, True), ("zero3", 2, False)],
)
SAVING = cells_of(["saving", "saving_zero2"], ["saving"])
SGD = {**OPTIMIZERS["sgd"], "max_steps": NUM_STEPS, "per_device_train_batch_size": ROWS_PER_STEP}
ADAMW = {**SGD, **OPTIMIZERS["adamw"], "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 3}
SKIPPING = {**SGD, "shuffle": False, "nonfinite_loss": "skip", "logging_steps": 1}
LOGGING = {**SGD, "log_rows": True, "eval_strategy": "steps", "eval_steps": 5}
LONGEST = max(len(row.ids) for row in tokenized(NUM_ROWS))
BAD_ROW = 9
Cell = tuple[str, int, bool]


def name_of(cell: Cell) -> str:
    engine, workers, checkpointed = cell
    return f"{engine}-{workers}{'-checkpointed' if checkpointed else ''}"


def together(variant: Variant, ranks: int = 2, size: int = 2) -> Variant:
    """The variant on `ranks`, of which each `size` compute rows together; a step has the same rows."""
    groups = ranks // size
    settings = {**variant.settings, "sequence_parallel_size": size}
    settings["per_device_train_batch_size"] = ROWS_PER_STEP // groups
    return replace(
        variant,
        settings=settings,
        num_ranks=ranks,
        max_tokens=-(-2 * LONGEST // (size * groups)),
        padded=False,
    )


def cells() -> list[Variant]:
    return [
        together(Variant(name_of(cell), {**SGD, **ENGINES[engine], "gradient_checkpointing": again}), workers)
        for cell in CELLS
        for engine, workers, again in [cell]
    ]


def alone(root: Path) -> list[Variant]:
    """Runs on one rank."""
    return [
        Variant("reference", SGD, padded=True),
        Variant("lora", SGD, padded=True, lora=True),
        Variant("loaded", SGD, padded=True, loaded=root / "base"),
        Variant("adamw", ADAMW, padded=True),
        Variant("logging", LOGGING, padded=True, evaluates=True),
    ]


def others(root: Path) -> list[Variant]:
    """Runs of ranks that compute rows together, beside the cells."""
    stages: dict[str, dict[str, Any]] = {"saving": {}, "saving_zero2": {"zero_stage": 2}}
    saving = [together(Variant(name, {**ADAMW, **stages[name]})) for name in SAVING]
    # Of two heads of keys, each on two ranks.
    four = [together(Variant("four_together", SGD), 4, 4)] if EVERY_CELL else []
    return [
        *saving,
        *(replace(variant, name=f"{variant.name}_resumed", stop_in=16) for variant in saving),
        replace(saving[0], name="stopped", stop_in=16, left=True),
        # With the budget that the ranks measure.
        replace(together(Variant("lora_together", {**SGD, "zero_stage": 2}, lora=True)), max_tokens=None),
        together(Variant("loaded_together", {**SGD, **GATHERED, "zero_init": True}, loaded=root / "base")),
        together(Variant("logging_together", LOGGING, evaluates=True)),
        *four,
    ]


@dataclass(frozen=True)
class Long:
    """A pair of `tokens`, of which two sides of 100 are its own; `layers` of a tiny model; steps over it."""

    name: str
    tokens: int
    layers: int
    steps: int


# What a rank holds is told by many layers, of which one rank computes the last of few tokens.
LONG, DEEP = Long("long", 16_384, 2, 2), Long("deep", 4_096, 8, 1)


def row_of(long: Long) -> TokenizedRow:
    ids = np.random.default_rng(0).integers(3, 390, long.tokens).astype(np.int32)
    return TokenizedRow.pair(*(np.concatenate([ids[:-200], part]) for part in (ids[-200:-100], ids[-100:])))


def train_long(root: Path, long: Long, size: int) -> None:
    """Train, and write the most tokens that a layer was given, and the most bytes held at a time."""
    name = f"{long.name}-{size}"
    settings = {**OPTIMIZERS["sgd"], "max_steps": long.steps, "sequence_parallel_size": size}
    job = job_of(Variant(name, settings, max_tokens=long.tokens // size), root / name, [row_of(long)])
    model: Any = tiny_model(seed=1, num_hidden_layers=long.layers, max_position_embeddings=long.tokens)
    # Its gradient would be sparse, and have no storage to be counted.
    model.get_input_embeddings().weight.requires_grad_(False)
    seen: set[int] = set()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape[1]))

    def run() -> None:
        train_rank(replace(job, source=ModelSource(model)), lambda record: None)

    peak = peak_bytes(run, torch.device("cpu"))
    rank = dist.get_rank() if dist.is_initialized() else 0
    (root / f"{name}-{rank}.json").write_text(json.dumps({"tokens": max(seen), "peak": peak}))


def rank_main(rank: int, num_ranks: int, root: Path, variants: Sequence[Variant]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(root / f"store-{num_ranks}"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        for variant in variants:
            train(variant, root, tokenized(NUM_ROWS))
        if num_ranks == 2:
            poisoned = together(Variant("skipping_together", SKIPPING, poison=POISON))
            train(poisoned, root, poisoned_rows())
            for long in (LONG, DEEP):
                train_long(root, long, 2)
    finally:
        dist.destroy_process_group()


def poisoned_rows() -> list[TokenizedRow]:
    rows = tokenized(NUM_ROWS)
    rows[BAD_ROW].ids[-1] = POISON
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together")
    torch.manual_seed(4)
    AutoModel.from_config(tiny_llama_config()).save_pretrained(root / "base")
    for variant in alone(root):
        train(variant, root, tokenized(NUM_ROWS))
    train(Variant("skipping", SKIPPING, poison=POISON), root, poisoned_rows())
    for long in (LONG, DEEP):
        train_long(root, long, 1)
    several = [*cells(), *others(root)]
    for num_ranks in (2, 4):
        chosen = [variant for variant in several if variant.num_ranks == num_ranks]
        if chosen:
            torch.multiprocessing.spawn(rank_main, (num_ranks, root, chosen), nprocs=num_ranks)
    # What two ranks began goes on, on one.
    shutil.copytree(root / "stopped", root / "moved")
    train(Variant("moved", ADAMW), root, tokenized(NUM_ROWS))
    return root


def assert_same(outcome: Outcome, reference: Outcome) -> None:
    assert len(outcome.losses) == len(reference.losses)
    assert differences(outcome, reference) == []
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        # One parameter's wrong gradient would not show in the norm of all.
        off = float((outcome.weights[name] - weight).norm() / weight.norm())
        assert off <= TOLERANCE, f"{name} differs by {off:.2e} of itself"


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_ranks_that_compute_rows_together_have_the_trajectory_of_one(runs: Path, cell: Cell) -> None:
    outcome = outcome_of(runs / name_of(cell))
    assert len(outcome.losses) == NUM_STEPS
    assert_same(outcome, outcome_of(runs / "reference"))


@pytest.mark.parametrize(
    ("run", "reference"),
    [
        ("lora_together", "lora"),
        ("loaded_together", "loaded"),
        *([("four_together", "reference")] if EVERY_CELL else []),
        ("saving", "adamw"),
        ("moved", "adamw"),
    ],
)
def test_so_have_adapters_models_in_parts_larger_groups_and_a_run_that_goes_on_alone(
    runs: Path, run: str, reference: str
) -> None:
    assert_same(outcome_of(runs / run), outcome_of(runs / reference))


@pytest.mark.parametrize("run", SAVING)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(runs: Path, run: str) -> None:
    whole, resumed = runs / run, runs / f"{run}_resumed"
    assert untimed(whole) == untimed(resumed)
    one, two = outcome_of(whole).weights, outcome_of(resumed).weights
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_logged_and_evaluated_counts_each_row_once(runs: Path) -> None:
    """All but the tokens computed: the reference pads them."""
    ours, theirs = untimed(runs / "logging_together"), untimed(runs / "logging")
    assert len(ours) == len(theirs) > NUM_STEPS
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"num_tokens_computed"}:
            assert one[name] == pytest.approx(other[name], abs=TOLERANCE, rel=TOLERANCE), name


def test_ranks_compute_the_tokens_of_the_rows_and_what_fills_the_last_part(runs: Path) -> None:
    (*_, last) = (r for r in untimed(runs / "logging_together") if "num_tokens_computed" in r)
    # No prompt is common to two rows, and a micro-batch is filled up by one token at most.
    tokens = sum(len(row.ids) for row in tokenized(NUM_ROWS))
    assert tokens <= last["num_tokens_computed"] <= tokens + 4 * NUM_STEPS


def test_the_row_log_has_each_row_of_an_epoch_once(runs: Path) -> None:
    names = Counter(name for line in read_row_log(runs / "logging_together") for name in line["rows"])
    assert names == {f"rows[{number}]": 1 for number in range(NUM_ROWS)}


def test_a_row_whose_loss_is_not_finite_is_left_out_and_named_once(runs: Path) -> None:
    ours, theirs = (
        [json.loads(line) for line in (runs / name / "quarantine.jsonl").read_text().splitlines()]
        for name in ("skipping_together", "skipping")
    )
    assert ours == theirs
    assert len(ours) == 1
    assert differences(outcome_of(runs / "skipping_together"), outcome_of(runs / "skipping")) == []


def test_of_a_pair_of_16k_tokens_each_rank_computes_half_of_them(runs: Path) -> None:
    for long in (LONG, DEEP):
        assert len(row_of(long).ids) == long.tokens
        assert measured(runs, long, 1)["tokens"] == long.tokens
        assert [measured(runs, long, 2, rank)["tokens"] for rank in (0, 1)] == [long.tokens // 2] * 2
        assert_same(outcome_of(runs / f"{long.name}-2"), outcome_of(runs / f"{long.name}-1"))


def test_each_rank_holds_about_half_of_what_one_would(runs: Path) -> None:
    """One rank computes the last of the eight layers of the scored tokens alone: 4 of 7."""
    one = measured(runs, DEEP, 1)["peak"]
    for rank in (0, 1):
        assert measured(runs, DEEP, 2, rank)["peak"] < 0.65 * one


def measured(runs: Path, long: Long, size: int, rank: int = 0) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((runs / f"{long.name}-{size}-{rank}.json").read_text())
    return read
