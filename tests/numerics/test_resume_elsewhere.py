"""A run goes on from its checkpoint on another number of ranks or at another ZeRO stage as if it had stayed.

Checkpoints are written after steps 3 and 6, and the run is stopped in step 8; another form of the run takes
the directory from there. Each has the losses and gradient norms of a run on one rank that was not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rayrm.errors import CheckpointError
from rayrm.train.worker import train_rank
from tests.cells import cells_of
from tests.numerics.ranks import GATHERED, Variant, job_of, outcome_of, run_variants, tokenized

# Sums in another order differ by about 1e-7 of their size a step.
TOLERANCE = 1e-5
NUM_STEPS = 11
# Divides by 1, 2 and 3 ranks.
ROWS = 12
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "fused": {"optim": "adamw_torch_fused", "learning_rate": 1e-3},
    "sgd": {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.003, "max_grad_norm": 0.0},
    "lora": {"optim": "adamw_torch", "learning_rate": 1e-2},
}
CPU = {"device": "cpu"}
STAGES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    "gathered": GATHERED,
    "offloaded2": {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}},
    "offloaded3": {
        "deepspeed": {
            "zero_optimization": {
                **GATHERED["deepspeed"]["zero_optimization"],
                "offload_optimizer": CPU,
                "offload_param": CPU,
            }
        }
    },
}
# Kind, then stage and ranks of the run that was stopped, and of the one that goes on.
EVERY_MOVE = [
    ("adamw", "torch", 2, "torch", 1),
    ("adamw", "zero0", 2, "torch", 1),
    ("adamw", "zero1", 2, "zero1", 1),
    ("adamw", "zero2", 2, "torch", 1),
    ("adamw", "zero3", 2, "zero3", 1),
    ("adamw", "gathered", 2, "torch", 1),
    ("adamw", "torch", 1, "zero0", 2),
    ("adamw", "torch", 1, "zero1", 2),
    ("adamw", "torch", 1, "gathered", 2),
    ("adamw", "zero2", 1, "zero2", 2),
    ("adamw", "torch", 2, "torch", 3),
    ("adamw", "zero1", 2, "zero2", 3),
    ("adamw", "zero3", 2, "zero1", 3),
    ("adamw", "gathered", 2, "gathered", 3),
    ("adamw", "zero2", 2, "zero3", 3),
    ("fused", "torch", 1, "zero2", 2),
    ("fused", "zero1", 2, "torch", 1),
    ("adamw", "offloaded2", 2, "torch", 1),
    ("adamw", "offloaded3", 2, "gathered", 2),
    ("fused", "torch", 1, "offloaded3", 2),
    ("sgd", "zero2", 2, "torch", 1),
    ("sgd", "torch", 1, "gathered", 2),
    ("momentum", "zero1", 2, "torch", 1),
    ("momentum", "torch", 1, "zero3", 2),
    ("momentum", "gathered", 2, "zero2", 3),
    ("lora", "zero2", 2, "torch", 1),
    ("lora", "torch", 1, "gathered", 2),
    ("lora", "gathered", 2, "zero1", 3),
]
MOVES = cells_of(
    EVERY_MOVE,
    [
        ("adamw", "torch", 2, "torch", 1),
        ("adamw", "zero1", 2, "zero1", 1),
        ("adamw", "zero2", 2, "torch", 1),
        ("adamw", "gathered", 2, "torch", 1),
        ("adamw", "torch", 1, "gathered", 2),
        ("adamw", "offloaded3", 2, "gathered", 2),
        ("fused", "zero1", 2, "torch", 1),
        ("momentum", "torch", 1, "zero3", 2),
        ("sgd", "torch", 1, "gathered", 2),
        ("lora", "zero2", 2, "torch", 1),
    ],
)


def form(kind: str, stage: str, ranks: int, name: str, **changes: Any) -> Variant:
    settings = {
        **KINDS[kind],
        **STAGES[stage],
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": ROWS // ranks,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return replace(Variant(name, settings, num_ranks=ranks, lora=kind == "lora"), **changes)


def name_of(move: tuple[str, str, int, str, int]) -> str:
    kind, stage, ranks, new_stage, new_ranks = move
    return f"{kind}-{stage}_{ranks}-{new_stage}_{new_ranks}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elsewhere")
    stopped = {
        f"{kind}-{stage}_{ranks}": form(kind, stage, ranks, f"{kind}-{stage}_{ranks}", stop_in=8, left=True)
        for kind, stage, ranks, *_ in MOVES
    }
    whole = [form(kind, "torch", 1, f"{kind}-whole") for kind in KINDS]
    run_variants([*whole, *stopped.values()], root)
    on = []
    for move in MOVES:
        kind, stage, ranks, new_stage, new_ranks = move
        shutil.copytree(root / f"{kind}-{stage}_{ranks}", root / name_of(move))
        on.append(form(kind, new_stage, new_ranks, name_of(move)))
    again = root / "again"
    again.mkdir()
    for variant in on:
        shutil.move(root / variant.name, again / variant.name)
    run_variants(on, again)
    return root


@pytest.mark.parametrize("move", MOVES, ids=name_of)
def test_a_run_that_goes_on_elsewhere_has_the_trajectory_of_one_that_stayed(
    runs: Path, move: tuple[str, str, int, str, int]
) -> None:
    whole, moved = outcome_of(runs / f"{move[0]}-whole"), outcome_of(runs / "again" / name_of(move))
    assert len(moved.losses) == NUM_STEPS
    np.testing.assert_allclose(moved.losses, whole.losses, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(moved.norms, whole.norms, rtol=TOLERANCE, atol=TOLERANCE)
    assert moved.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        # Of elements without a gradient of note, Adam makes a step of rounding: the whole weight counts.
        assert float((moved.weights[name] - weight).norm()) <= 1e-4 * float(weight.norm() + 1.0), name


@pytest.mark.parametrize("stage", ["zero1", "gathered"])
def test_under_zero_each_rank_writes_its_share_and_together_they_write_each_number_once(
    runs: Path, stage: str
) -> None:
    def stored(directory: Path) -> list[int]:
        sizes = []
        for file in sorted((directory / "checkpoint-6" / "engine").glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:
                keys = list(opened.keys())
                sizes.append(sum(opened.get_slice(key).get_shape()[0] for key in keys))
        return sizes

    (whole,), shares = stored(runs / "adamw-torch_1"), stored(runs / f"adamw-{stage}_2")
    assert len(shares) == 2
    assert sum(shares) == whole
    assert min(shares) > 0.4 * whole


def test_without_its_optimizer_state_the_run_is_another(runs: Path, tmp_path: Path) -> None:
    """The comparison sees what a checkpoint must hold."""
    shutil.copytree(runs / "momentum-torch_1", tmp_path / "run")
    engine = tmp_path / "run" / "checkpoint-6" / "engine"
    listing = json.loads((engine / "rank-0.json").read_text())
    listing["slices"] = [piece for piece in listing["slices"] if piece[2] == "weight"]
    (engine / "rank-0.json").write_text(json.dumps(listing))
    manifest = engine.parent / "checkpoint.json"
    files = json.loads(manifest.read_text())
    files["files"].pop("engine/rank-0.json")
    manifest.write_text(json.dumps(files))
    run_variants([form("momentum", "torch", 1, "run")], tmp_path)
    whole, lost = outcome_of(runs / "momentum-whole"), outcome_of(tmp_path / "run")
    assert not np.allclose(lost.losses, whole.losses, rtol=TOLERANCE, atol=TOLERANCE)


def test_another_optimizer_or_adapter_is_refused_by_name(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "adamw-torch_1", tmp_path / "sgd")
    with pytest.raises(CheckpointError, match=r"optimizer `AdamW`.*this run's is `SGD`"):
        train_rank(job_of(form("sgd", "torch", 1, "sgd"), tmp_path / "sgd", tokenized()), lambda _: None)
    shutil.copytree(runs / "adamw-torch_1", tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"does not hold the parameters that this run trains|group"):
        train_rank(job_of(form("lora", "torch", 1, "lora"), tmp_path / "lora", tokenized()), lambda _: None)


def test_a_scheduler_of_the_checkpoint_goes_on(runs: Path) -> None:
    rates = [
        [
            json.loads(line).get("learning_rate")
            for line in (directory / "metrics.jsonl").read_text().splitlines()
        ]
        for directory in (
            runs / "adamw-whole",
            runs / "again" / name_of(("adamw", "gathered", 2, "torch", 1)),
        )
    ]
    assert rates[0] == rates[1]
    assert torch.tensor(rates[0][:-1]).diff().lt(0).all()
