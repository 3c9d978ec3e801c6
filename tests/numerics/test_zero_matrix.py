"""Law 1 over ZeRO: stage x {full, LoRA} x workers x recomputed layers give one trajectory, shown as a table.

The reference is the stock padded forward on one rank, with plain PyTorch. SGD without clipping: AdamW would
hide a gradient that is wrong by a factor. Stage 3 gathers every weight for each use; by default DeepSpeed
keeps a tiny model's whole.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.numerics.ranks import GATHERED, Outcome, Variant, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import OPTIMIZERS, TOLERANCE, differences

# One fixture trains all cells.
pytestmark = pytest.mark.timeout(1800)
# An epoch, whose last step has two rows.
NUM_ROWS, ROWS_PER_STEP, NUM_STEPS = 38, 4, 10
TRAINED = {"full": False, "LoRA": True}
STAGES: dict[int, dict[str, Any]] = {**{stage: {"zero_stage": stage} for stage in range(3)}, 3: GATHERED}
CELLS = list(itertools.product(TRAINED, STAGES, (1, 2), (False, True)))
STEP = {**OPTIMIZERS["sgd"], "max_steps": NUM_STEPS, "per_device_train_batch_size": ROWS_PER_STEP}
Cell = tuple[str, int, int, bool]


def name_of(cell: Cell) -> str:
    trained, stage, workers, checkpointed = cell
    return f"{trained}-zero{stage}-{workers}{'-checkpointed' if checkpointed else ''}"


def variant_of(cell: Cell, longest: int) -> Variant:
    trained, stage, workers, checkpointed = cell
    settings = {
        **STEP,
        **STAGES[stage],
        "per_device_train_batch_size": ROWS_PER_STEP // workers,
        "gradient_checkpointing": checkpointed,
    }
    # A step has several micro-batches, whose gradients each stage adds up in its own way.
    budget = 2 * longest // workers
    return Variant(name_of(cell), settings, max_tokens=budget, num_ranks=workers, lora=TRAINED[trained])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    rows = tokenized(NUM_ROWS)
    longest = max(len(row.ids) for row in rows)
    reference = Variant("reference", STEP, padded=True)
    references = [
        replace(reference, name=f"{trained}-reference", lora=lora) for trained, lora in TRAINED.items()
    ]
    run_variants([*references, *(variant_of(cell, longest) for cell in CELLS)], root, rows)
    return root


def reference_of(runs: Path, cell: Cell) -> Outcome:
    return outcome_of(runs / f"{cell[0]}-reference")


def largest(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """The largest difference of any step, relative to the reference's value."""
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())


def table(runs: Path) -> str:
    """One line a cell: the largest relative differences of loss and gradient norm from the reference."""
    lines = [
        f"largest relative difference over {NUM_STEPS} steps from one rank, plain PyTorch, padded",
        "| weights | ZeRO | workers | gradient checkpointing | loss | gradient norm |",
        "|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        outcome, reference = outcome_of(runs / name_of(cell)), reference_of(runs, cell)
        loss, norm = largest(outcome.losses, reference.losses), largest(outcome.norms, reference.norms)
        trained, stage, workers, checkpointed = cell
        on = "on" if checkpointed else "off"
        lines.append(f"| {trained} | {stage} | {workers} | {on} | {loss:.1e} | {norm:.1e} |")
    return "\n".join(lines)


def test_the_table_of_the_matrix(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = table(runs)
    (runs / "matrix.md").write_text(text + "\n")
    with capsys.disabled():
        print(f"\n{text}\nalso in {runs / 'matrix.md'}")
    assert text.count("\n") == 2 + 32


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_every_cell_has_the_reference_trajectory(runs: Path, cell: Cell) -> None:
    outcome, reference = outcome_of(runs / name_of(cell)), reference_of(runs, cell)
    assert len(outcome.losses) == NUM_STEPS
    assert differences(outcome, reference) == []
    assert largest(outcome.losses, reference.losses) <= TOLERANCE
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        # One parameter's wrong gradient would not show in the norm of all.
        off = float((outcome.weights[name] - weight).norm() / weight.norm())
        assert off <= TOLERANCE, f"{name} differs by {off:.2e} of itself"
