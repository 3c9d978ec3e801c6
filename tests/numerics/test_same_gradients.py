"""Law 1: however a step is cut, laid out or distributed, the losses and gradients are the same.

The reference is the stock padded forward on one rank. AdamW and clipping hide a gradient that is wrong by a
factor (they normalise it away), so norms before clipping are compared, and every form also runs with SGD.
A step of SGD with a huge learning rate gives each parameter's gradient back from the saved weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.errors import ConfigError
from rayrm.train.worker import train_rank
from tests.cells import cells_of
from tests.numerics.ranks import (
    GATHERED,
    NUM_STEPS,
    Outcome,
    Variant,
    job_of,
    outcome_of,
    run_variants,
    tokenized,
)
from tests.tiny import tiny_model

# float32 sums in another order differ by about 1e-7 of their size a step; 20 steps of AdamW carry that to
# some 1e-6. 1e-4 is far above that and far below any error of ours that matters.
TOLERANCE = 1e-4

OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    # Above about 0.03 this run is chaotic: rounding alone grows tenfold every three steps.
    "sgd": {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0},
}
# The update of one step, divided by this, is the gradient; large, for the sake of the weights' digits.
HUGE = 1000.0
PROBE = {
    "optim": "sgd",
    "learning_rate": HUGE,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "lr_scheduler_type": "constant",
}


def forms() -> list[Variant]:
    """Every way to run a step, without its optimizer."""
    longest = max(len(pair.ids) for pair in tokenized())
    one_rank = [
        Variant("packed", {"share_prefix": False}),
        Variant("shared"),
        Variant("half_budget", max_tokens=2 * longest),
        Variant(
            "accumulated",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            max_tokens=longest,
        ),
        Variant("checkpointed", {"gradient_checkpointing": True}),
        # The budget grows to the longest row: the others of its step are padded beside none.
        Variant("padded_row_by_row", padded=True, max_tokens=1),
        Variant("padded_checkpointed", {"gradient_checkpointing": True}, padded=True),
    ]
    two_ranks = [
        Variant("two_ranks", num_ranks=2),
        # A budget of one pair: ranks have unequal numbers of rows, and dummies fill up the shorter plan.
        Variant("two_ranks_small_budget", max_tokens=longest, num_ranks=2),
        *(
            Variant(f"two_ranks_zero{stage}", {"zero_stage": stage}, max_tokens=2 * longest, num_ranks=2)
            for stage in range(4)
        ),
        Variant("two_ranks_gathered", GATHERED, max_tokens=2 * longest, num_ranks=2),
    ]
    return one_rank + two_ranks


# With SGD the stages of ZeRO are a matrix of their own: `test_zero_matrix.py`.
IN_MATRIX = [f"two_ranks_zero{stage}" for stage in range(4)] + ["two_ranks_gathered"]
REFERENCE = Variant("reference", padded=True)
FROZEN = Variant("frozen", {"learning_rate": 0.0})
DOUBLED = Variant("doubled", gradients_times=2.0)
# Run a second time: law 4.
AGAIN = [Variant("shared_again"), Variant("two_ranks_again", num_ranks=2)]
FORMS = [form.name for form in forms()]
# Checkpoints after steps 6, 12 and 18, cut off in step 9: two steps are trained a second time. The first
# checkpoint falls between two logs.
SAVING = {**OPTIMIZERS["adamw"], "save_strategy": "steps", "save_steps": 6, "logging_steps": 4}


def interrupted() -> list[Variant]:
    """Runs that save checkpoints, and each once more, stopped and resumed."""
    whole = [
        Variant("saving", SAVING),
        *(
            Variant(f"saving_zero{stage}_{ranks}", {**SAVING, "zero_stage": stage}, num_ranks=ranks)
            for stage, ranks in [(2, 1), (0, 2), (1, 2), (2, 2), (3, 2)]
        ),
        Variant("saving_two_ranks", SAVING, num_ranks=2),
        Variant("saving_gathered", {**SAVING, **GATHERED}, num_ranks=2),
    ]
    few = ["saving", "saving_zero2_1", "saving_zero1_2", "saving_two_ranks", "saving_gathered"]
    kept = cells_of([variant.name for variant in whole], few)
    whole = [variant for variant in whole if variant.name in kept]
    return whole + [replace(variant, name=f"{variant.name}_resumed", stop_in=9) for variant in whole]


INTERRUPTED = [variant.name for variant in interrupted() if variant.stop_in is None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each in `<form>-<optimizer>`: trained once for the module."""
    root = tmp_path_factory.mktemp("runs")
    variants = []
    for form in [REFERENCE, FROZEN, DOUBLED, *AGAIN, *forms()]:
        for optimizer, settings in {**OPTIMIZERS, "probe": PROBE}.items():
            name = f"{form.name}-{optimizer}"
            if optimizer == "sgd" and form.name in IN_MATRIX:
                continue
            variants.append(replace(form, name=name, settings={**settings, **form.settings}))
    run_variants([*variants, *interrupted()], root)
    return root


def differences(outcome: Outcome, reference: Outcome) -> list[str]:
    """Where a trajectory is not the reference's, in words; empty where it is."""
    found = []
    loss = np.abs(outcome.losses - reference.losses).max()
    if not loss <= TOLERANCE:
        found.append(f"losses differ by {loss:.2e}")
    norm = (np.abs(outcome.norms - reference.norms) / reference.norms).max()
    if not norm <= TOLERANCE:
        found.append(f"gradient norms differ by {norm:.2e} of themselves")
    return found


def gradients(outcome: Outcome) -> dict[str, torch.Tensor]:
    """Every parameter's gradient at step 1, from the weights that one step of SGD left."""
    start = tiny_model(seed=1).state_dict()
    return {name: (start[name].double() - after.double()) / HUGE for name, after in outcome.weights.items()}


def gradient_differences(outcome: Outcome, reference: Outcome) -> list[str]:
    """Which parameters' gradients are not the reference's, relative to each one's own norm."""
    mine, theirs = gradients(outcome), gradients(reference)
    assert mine.keys() == theirs.keys()
    off = {name: float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in mine}
    return [f"{name} differs by {by:.2e}" for name, by in off.items() if not by <= TOLERANCE]


@pytest.mark.parametrize(("settings", "most_kept"), [(GATHERED, 0), ({"zero_stage": 3}, 10 * 32)])
def test_the_gathered_forms_gather_every_weight_and_the_others_all_but_small_ones(
    tmp_path: Path, settings: dict[str, Any], most_kept: int
) -> None:
    job = job_of(Variant("run", {"max_steps": 1, **settings}), tmp_path, tokenized(8))
    model: Any = job.source.model
    seen: list[tuple[int, bool]] = []
    model.score.register_forward_hook(
        lambda *_: seen.extend((p.ds_numel, p.ds_persist) for p in model.parameters())
    )
    train_rank(job, lambda record: None)
    assert {size for size, _ in seen} >= {32, 32 * 32}
    assert all(is_kept == (size <= most_kept) for size, is_kept in seen)


@pytest.mark.parametrize(
    ("form", "optimizer"),
    [
        (form, optimizer)
        for form in FORMS
        for optimizer in OPTIMIZERS
        if optimizer == "adamw" or form not in IN_MATRIX
    ],
)
def test_every_form_of_a_run_has_the_reference_trajectory(runs: Path, form: str, optimizer: str) -> None:
    outcome = outcome_of(runs / f"{form}-{optimizer}")
    assert len(outcome.losses) == NUM_STEPS
    assert differences(outcome, outcome_of(runs / f"reference-{optimizer}")) == []


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_the_reference_gradient_at_the_first_step(runs: Path, form: str) -> None:
    assert (
        gradient_differences(outcome_of(runs / f"{form}-probe"), outcome_of(runs / "reference-probe")) == []
    )


def test_the_reference_learns(runs: Path) -> None:
    for optimizer in OPTIMIZERS:
        learned = outcome_of(runs / f"reference-{optimizer}").losses
        # Of the same rows: those of some steps are harder than others'.
        frozen = outcome_of(runs / f"frozen-{optimizer}").losses
        assert learned[-5:].mean() < frozen[-5:].mean() - 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrong", ["frozen", "doubled"])
def test_the_comparison_sees_a_wrong_run(runs: Path, wrong: str, optimizer: str) -> None:
    reference = outcome_of(runs / f"reference-{optimizer}")
    assert differences(outcome_of(runs / f"{wrong}-{optimizer}"), reference) != []


@pytest.mark.parametrize("wrong", ["frozen", "doubled"])
def test_the_comparison_of_gradients_sees_every_wrong_parameter(runs: Path, wrong: str) -> None:
    reference = outcome_of(runs / "reference-probe")
    found = gradient_differences(outcome_of(runs / f"{wrong}-probe"), reference)
    assert len(found) == len(reference.weights)


@pytest.mark.parametrize("form", ["shared", "two_ranks"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_run_twice_gives_the_same_bits(runs: Path, form: str, optimizer: str) -> None:
    first, second = runs / f"{form}-{optimizer}", runs / f"{form}_again-{optimizer}"
    assert untimed(first) == untimed(second)
    one, two = outcome_of(first).weights, outcome_of(second).weights
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("form", INTERRUPTED)
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_interrupted(runs: Path, form: str) -> None:
    assert untimed(runs / form) == untimed(runs / f"{form}_resumed")
    whole, resumed = outcome_of(runs / form).weights, outcome_of(runs / f"{form}_resumed").weights
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def untimed(directory: Path) -> list[dict[str, float]]:
    """Every record of a run, without what a clock measured."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    clocked = ("per_second", "runtime", "_s")
    return [{key: value for key, value in record.items() if not key.endswith(clocked)} for record in records]


def test_a_budget_below_a_padded_row_is_refused_at_the_start_with_the_number_to_type(tmp_path: Path) -> None:
    rows = [row for row in tokenized() if abs(row.lengths[0] - row.lengths[1]) > 2]
    padded = max(2 * max(row.lengths) for row in rows)
    assert padded > max(sum(row.lengths) for row in rows)
    for budget in (padded - 1, padded):
        variant = Variant(f"{budget}", {"max_tokens_per_microbatch": budget}, padded=True, max_tokens=budget)
        if budget < padded:
            with pytest.raises(
                ConfigError, match=rf"longest row \({padded} tokens, padded\). Raise it to {padded}"
            ):
                run_variants([variant], tmp_path, rows)
        else:
            run_variants([variant], tmp_path, rows)
