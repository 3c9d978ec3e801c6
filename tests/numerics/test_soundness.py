"""A loss that is not finite: the rows are named, nothing of it is saved, or its step is left out exactly.

The NaN is real: one token's embedding is NaN, and of all rows one has that token.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import RayrmError
from rayrm.train.checkpoint import checkpoints
from rayrm.train.worker import train_rank
from tests.cells import cells_of
from tests.numerics.ranks import GATHERED, PAIRS_PER_STEP, Variant, job_of, run_variants, tokenized
from tests.tiny import saved_weights, tiny_model

POISON = 7  # `<|tools|>`: no tiny row has it
BAD_STEP = 4
BAD_ROW = (BAD_STEP - 1) * PAIRS_PER_STEP + 5
NUM_STEPS = 7
TOLERANCE = 1e-4


def poisoned(*bad: int) -> list[TokenizedRow]:
    """Rows of which the `bad` ones hold the token in their last completion."""
    rows = tokenized(NUM_STEPS * PAIRS_PER_STEP)
    for number in bad:
        rows[number].ids[-1] = POISON
    return rows


# The course of the learning rate: over more steps than there are, whatever the number of steps.
SETTINGS: dict[str, Any] = {
    "shuffle": False,
    "num_train_epochs": 1,
    "max_steps": -1,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "learning_rate": 2e-3,
}
SKIPPING = {**SETTINGS, "nonfinite_loss": "skip"}
STOPPING = {**SETTINGS, "logging_steps": 10, "save_strategy": "steps", "save_steps": 3}


def skipping() -> list[Variant]:
    """Every engine, on one rank and on two, some with micro-batches of few rows."""
    small = 2 * max(len(row.ids) for row in poisoned(BAD_ROW))
    one = [
        Variant("torch", SKIPPING),
        Variant("padded", SKIPPING, padded=True),
        *(Variant(f"zero{stage}", {**SKIPPING, "zero_stage": stage}) for stage in range(4)),
    ]
    two = [
        Variant("two_torch", SKIPPING, max_tokens=small),
        *(
            Variant(f"two_zero{stage}", {**SKIPPING, "zero_stage": stage}, max_tokens=small)
            for stage in range(4)
        ),
        Variant("two_gathered", {**SKIPPING, **GATHERED}),
        Variant("two_unclipped", {**SKIPPING, "zero_stage": 0, "max_grad_norm": 0.0}),
    ]
    every = one + [replace(variant, num_ranks=2) for variant in two]
    few = ["torch", "padded", "zero0", "zero2", "two_torch", "two_zero2", "two_gathered", "two_unclipped"]
    kept = cells_of([variant.name for variant in every], few)
    return [replace(variant, poison=POISON) for variant in every if variant.name in kept]


SKIPPING_FORMS = [variant.name for variant in skipping()]
# Step 6 is left out, then training is cut off in step 7, and goes on after step 5.
SAVING = {**SKIPPING, "logging_steps": 4, "save_strategy": "steps", "save_steps": 5}
LATE_ROW = 5 * PAIRS_PER_STEP + 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_variants(skipping(), root, poisoned(BAD_ROW))
    saving = [Variant(f"saving{ranks}", SAVING, num_ranks=ranks, poison=POISON) for ranks in (1, 2)]
    again = [replace(variant, name=f"{variant.name}_resumed", stop_in=7) for variant in saving]
    run_variants([*saving, *again], root / "saving", poisoned(LATE_ROW))
    return root


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on the same rows but those of the bad step: by clipping."""
    root = tmp_path_factory.mktemp("without")
    first = (BAD_STEP - 1) * PAIRS_PER_STEP
    rows = poisoned()
    rows = rows[:first] + rows[first + PAIRS_PER_STEP :]
    unclipped = {**SETTINGS, "max_grad_norm": 0.0}
    run_variants(
        [Variant("clipped", SETTINGS, poison=POISON), Variant("unclipped", unclipped, poison=POISON)],
        root,
        rows,
    )
    return {name: root / name for name in ("clipped", "unclipped")}


def records_of(directory: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clocked = ("per_second", "runtime", "_s")
    return [{key: value for key, value in record.items() if not key.endswith(clocked)} for record in records]


def quarantined(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", SKIPPING_FORMS)
def test_a_skipped_step_leaves_the_trajectory_of_a_run_without_it(
    runs: Path, without: dict[str, Path], form: str
) -> None:
    reference = without["unclipped" if "unclipped" in form else "clipped"]
    *steps, end = records_of(runs / form)
    *expected, expected_end = records_of(reference)
    assert [step["skipped_steps"] for step in steps] == [int(n == BAD_STEP) for n in range(1, NUM_STEPS + 1)]
    left_out = steps.pop(BAD_STEP - 1)
    assert "loss" not in left_out
    for key in ("loss", "grad_norm", "learning_rate", "accuracy"):
        found, wanted = ([step[key] for step in run] for run in (steps, expected))
        np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)
    assert end["train_loss"] == pytest.approx(expected_end["train_loss"], rel=TOLERANCE)
    mine, theirs = saved_weights(runs / form), saved_weights(reference)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if form == "torch":
            assert torch.equal(weight.nan_to_num(), theirs[name].nan_to_num()), name
    # Learning moves weights by far more than the tolerance.
    assert not torch.allclose(mine["score.weight"], tiny_model(seed=1).score.weight, atol=10 * TOLERANCE)


@pytest.mark.parametrize("form", SKIPPING_FORMS)
def test_the_rows_of_a_skipped_step_that_are_at_fault_are_kept(runs: Path, form: str) -> None:
    (entry,) = quarantined(runs / form)
    assert (entry["source"], entry["row"], entry["reason"]) == ("rows", BAD_ROW, "nonfinite-loss")
    assert f"rows[{BAD_ROW}]" in entry["message"]
    assert f"step {BAD_STEP} " in entry["message"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_skips_and_counts_as_one_that_was_not_interrupted(runs: Path, ranks: int) -> None:
    whole, resumed = (runs / "saving" / f"saving{ranks}{end}" for end in ("", "_resumed"))
    assert records_of(whole) == records_of(resumed)
    assert [record["skipped_steps"] for record in records_of(whole) if "loss" in record] == [0]
    assert quarantined(whole) == quarantined(resumed)
    assert [entry["row"] for entry in quarantined(whole)] == [LATE_ROW]
    one, two = saved_weights(whole), saved_weights(resumed)
    assert all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)


@pytest.mark.parametrize(
    ("ranks", "form"),
    cells_of(
        itertools.product((1, 2), ("torch", "padded", "zero2")),
        [(1, "torch"), (1, "padded"), (1, "zero2"), (2, "zero2")],
    ),
)
def test_a_run_stops_before_it_saves_and_names_the_step_and_the_row(
    tmp_path: Path, ranks: int, form: str
) -> None:
    """The checkpoint after step 6 is due, and step 4 was bad: all rows of steps 5 and 6 follow from it."""
    variant = Variant(
        "run",
        {**STOPPING, "zero_stage": 2 if form == "zero2" else None},
        num_ranks=ranks,
        padded=form == "padded",
        max_tokens=1 if form == "padded" else max(len(row.ids) for row in poisoned(BAD_ROW)),
        poison=POISON,
        fails=rf"at step {BAD_STEP}, in 1 of its 8 rows: rows\[{BAD_ROW}\]\. Look at this row",
    )
    run_variants([variant], tmp_path, poisoned(BAD_ROW))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_of_many_rows_five_are_shown_and_how_to_learn_which_are_at_fault(tmp_path: Path) -> None:
    named = ", ".join(rf"rows\[{number}\]" for number in range(5))
    said = rf"step 1, in 7 of its 8 rows: {named} and 2 more\. Look at these rows.*scores each alone"
    run_variants(
        [Variant("run", SETTINGS, padded=True, poison=POISON, fails=said)], tmp_path, poisoned(*range(7))
    )


@pytest.mark.parametrize(
    "settings", [{"logging_strategy": "no"}, {"eval_strategy": "steps", "logging_steps": 10}]
)
def test_an_unsound_step_is_seen_at_the_end_and_before_an_evaluation(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    variant = Variant("run", {**SETTINGS, **settings, "eval_steps": 5}, poison=POISON)
    job = job_of(variant, tmp_path / "run", poisoned(BAD_ROW))
    if "eval_strategy" in settings:
        job = replace(job, eval_sets={"": job.train_set})
    with pytest.raises(RayrmError, match=rf"at step {BAD_STEP}, in \d of its 8 rows"):
        train_rank(job, lambda record: None)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_without_a_row_s_loss_is_told_apart(tmp_path: Path) -> None:
    said = r"gradient norm \(\w+\) is not finite at step 1, though the loss of each of its 8 rows is\."
    variant = Variant("stops", SETTINGS, gradients_times=float("inf"), fails=said)
    left_out = Variant("skips", SKIPPING, gradients_times=float("inf"))
    run_variants([variant, left_out], tmp_path, poisoned())
    *steps, _ = records_of(tmp_path / "skips")
    assert [step["skipped_steps"] for step in steps] == [1] * NUM_STEPS
    start, end = tiny_model(seed=1).state_dict(), saved_weights(tmp_path / "skips")
    assert all(torch.equal(start[name], weight) for name, weight in end.items())
    assert not (tmp_path / "skips" / "quarantine.jsonl").read_text()
