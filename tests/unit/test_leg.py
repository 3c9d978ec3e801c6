"""A leg goes on from a checkpoint with other settings as a run whose settings change in its middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rayrm.errors import CheckpointError, RunDirectoryError
from rayrm.train.checkpoint import TrainState, checkpoints
from rayrm.train.leg import MAY_CHANGE, Leg
from rayrm.train.loop import Schedule
from rayrm.train.records import read_progress, read_records
from rayrm.train.rundir import claim, examine
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Variant, job_of, tokenized
from tests.tiny import saved_weights
from tests.unit.test_rundir import identity
from tests.whole_checkpoint import save_whole

NUM_STEPS, CHANGES_AFTER = 8, 3
PLAN: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": CHANGES_AFTER,
    "optim": "adamw_torch",
}
BEFORE: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_epsilon": 1e-8}
AFTER: dict[str, Any] = {"learning_rate": 5e-3, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_epsilon": 1e-4}
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
}


class Changes(TrainerCallback):
    """After the third step this run's optimizer has the other settings; nothing is saved or loaded."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step != CHANGES_AFTER:
            return
        schedule = given["lr_scheduler"]
        schedule.base_lrs = [AFTER["learning_rate"] for _ in schedule.base_lrs]
        for group, decay in zip(given["optimizer"].param_groups, (AFTER["weight_decay"], 0.0), strict=True):
            # Linear over 8 steps, of which 3 are done.
            group["lr"] = AFTER["learning_rate"] * (1 - CHANGES_AFTER / NUM_STEPS)
            group["betas"] = (AFTER["adam_beta1"], 0.999)
            group["eps"], group["weight_decay"] = AFTER["adam_epsilon"], decay


def train(home: Path, settings: dict[str, Any], **changes: Any) -> Path:
    job = job_of(Variant("x", {**PLAN, **settings}), home, tokenized(40))
    train_rank(replace(job, **changes), lambda _: None)
    (home / ".leave").unlink(missing_ok=True)  # the word for the driver, which there is none of
    return home


def leg_from(home: Path, before: Path, settings: dict[str, Any], **changes: Any) -> Path:
    (checkpoint,) = checkpoints(before)
    assert checkpoint.name == f"checkpoint-{CHANGES_AFTER}"
    return train(home, settings, resume=checkpoint, **changes)


def equal(one: Path, two: Path) -> bool:
    first, second = saved_weights(one), saved_weights(two)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_leg_equals_a_run_whose_optimizer_is_changed_in_its_middle(tmp_path: Path, engine: str) -> None:
    kind = ENGINES[engine]
    first = train(tmp_path / "first", {**kind, **BEFORE}, leg=Leg(30.0))
    assert read_progress(first) == {"step": CHANGES_AFTER, "num_steps": NUM_STEPS, "finished": False}
    assert not (first / "model.safetensors").exists()
    leg = leg_from(tmp_path / "leg", first, {**kind, **AFTER}, leg=Leg())
    by_hand = train(tmp_path / "by-hand", {**kind, **BEFORE}, callbacks=(Changes(),))
    assert equal(leg, by_hand)
    rates = [record["learning_rate"] for record in read_records(leg) if "loss" in record]
    assert rates == pytest.approx([5e-3 * (1 - step / NUM_STEPS) for step in range(CHANGES_AFTER, NUM_STEPS)])


def test_a_leg_that_was_cut_off_goes_on_and_a_plain_run_keeps_the_checkpoint_s_settings(
    tmp_path: Path,
) -> None:
    first = train(tmp_path / "first", BEFORE, leg=Leg(30.0))
    leg = leg_from(tmp_path / "leg", first, AFTER, leg=Leg())
    # A checkpoint by itself brings the settings that it was written with.
    assert not equal(leg, leg_from(tmp_path / "plain", first, AFTER))
    parted = leg_from(tmp_path / "parted", first, AFTER, leg=Leg(70.0))
    assert [path.name for path in checkpoints(parted)] == ["checkpoint-6"]
    assert equal(leg, train(parted, AFTER, leg=Leg()))


@pytest.mark.parametrize("change", [{"max_grad_norm": 0.01}, {"label_smoothing": 0.2}])
def test_what_is_no_state_of_the_optimizer_is_the_leg_s_own(tmp_path: Path, change: dict[str, Any]) -> None:
    """As a plain run that is told it goes on from the checkpoint, which knows nothing of these."""
    first = train(tmp_path / "first", BEFORE, leg=Leg(30.0))
    leg = leg_from(tmp_path / "leg", first, {**BEFORE, **change}, leg=Leg())
    assert equal(leg, leg_from(tmp_path / "plain", first, {**BEFORE, **change}))
    assert not equal(leg, leg_from(tmp_path / "same", first, BEFORE))


def test_a_leg_without_another_setting_changes_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", BEFORE)
    first = train(tmp_path / "first", BEFORE, leg=Leg(30.0))
    assert equal(whole, leg_from(tmp_path / "leg", first, BEFORE, leg=Leg()))


@pytest.mark.parametrize(
    ("until", "every", "last"),
    [(20.0, 10, 20), (25.0, 10, 30), (20.0, 30, 30), (99.0, 10, None), (None, 10, None), (20.0, None, None)],
)
def test_a_leg_ends_with_the_first_evaluation_from_its_percentage_on(
    until: float | None, every: int | None, last: int | None
) -> None:
    schedule = Schedule(100, 50, log_every=None, evaluate_every=every, save_every=None)
    assert Leg(until).last_step(schedule) == last


def test_only_a_leg_goes_on_from_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    claim(tmp_path / "donor", identity(), None, "# run\n")
    checkpoint = save_whole(tmp_path / "donor", TrainState(step=30, max_tokens=64))
    home, other = tmp_path / "new", identity(learning_rate=3e-5, weight_decay=0.1)
    with pytest.raises(CheckpointError, match=r"differ in learning_rate: 0\.0001 there, 3e-05 here"):
        examine(home, other, resume=str(checkpoint))
    assert examine(home, other, resume=str(checkpoint), may_differ=MAY_CHANGE).resume == checkpoint
    with pytest.raises(CheckpointError, match="differ in seed: 42 there, 9 here"):
        examine(home, identity(seed=9, weight_decay=0.1), resume=str(checkpoint), may_differ=MAY_CHANGE)
    # In its own directory a leg is one run, as any.
    with pytest.raises(RunDirectoryError, match="differ in learning_rate"):
        examine(tmp_path / "donor", other, resume=True, may_differ=MAY_CHANGE)
