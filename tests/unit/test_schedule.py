"""When a run logs, evaluates and saves: as transformers' Trainer does for the same settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from rayrm.config import RewardConfig
from rayrm.train.loop import Schedule

STRATEGY = st.sampled_from(["no", "steps", "epoch"])
INTERVAL = st.one_of(st.integers(1, 7), st.sampled_from([0.1, 0.25, 0.5]))


def transformers_events(fields: dict[str, Any], num_steps: int, steps_per_epoch: int) -> dict[str, list[int]]:
    """The steps after which transformers' own callback asks for each event."""
    arguments = TrainingArguments("unused", use_cpu=True, **fields)
    state, flow = TrainerState(max_steps=num_steps), DefaultFlowCallback()
    state.compute_steps(arguments, num_steps)
    events: dict[str, list[int]] = {"log": [], "evaluate": [], "save": []}
    for step in range(1, num_steps + 1):
        state.global_step, state.epoch = step, step / steps_per_epoch
        control = TrainerControl()
        flow.on_step_end(arguments, state, control)
        # The Trainer ends an epoch after its last step, or when training stops within it.
        if step % steps_per_epoch == 0 or control.should_training_stop:
            flow.on_epoch_end(arguments, state, control)
        for event, asked in [
            ("log", control.should_log),
            ("evaluate", control.should_evaluate),
            ("save", control.should_save),
        ]:
            if asked:
                events[event].append(step)
    return events


@settings(deadline=None, max_examples=80)
@given(
    logging=st.tuples(STRATEGY, INTERVAL, st.booleans()),
    evaluation=st.tuples(STRATEGY, INTERVAL),
    saving=st.tuples(STRATEGY, INTERVAL),
    delay=st.one_of(st.just(0), st.integers(1, 12), st.just(1.5)),
    num_steps=st.integers(1, 25),
    steps_per_epoch=st.integers(1, 10),
)
def test_events_fall_on_the_steps_of_transformers(
    logging: tuple[str, float, bool],
    evaluation: tuple[str, float],
    saving: tuple[str, float],
    delay: float,
    num_steps: int,
    steps_per_epoch: int,
) -> None:
    fields: dict[str, Any] = {
        "max_steps": num_steps,
        "logging_strategy": logging[0],
        "logging_steps": logging[1],
        "logging_first_step": logging[2],
        "eval_strategy": evaluation[0],
        "eval_steps": evaluation[1],
        "eval_delay": delay,
        "save_strategy": saving[0],
        "save_steps": saving[1],
    }
    schedule = Schedule.of(RewardConfig(**fields), steps_per_epoch)
    every = range(1, num_steps + 1)
    ours = {
        "log": [step for step in every if schedule.logs(step)],
        "evaluate": [step for step in every if schedule.evaluates(step)],
        "save": [step for step in every if schedule.saves(step)],
    }
    assert ours == transformers_events(fields, num_steps, steps_per_epoch)


def test_nothing_is_due_before_the_first_step() -> None:
    schedule = Schedule(10, 5, log_every=1, evaluate_every=2, save_every=0)
    assert [schedule.logs(0), schedule.evaluates(0), schedule.saves(0)] == [False] * 3


@pytest.mark.parametrize(("epochs", "steps"), [(3.0, 39), (0.5, 7), (1.1, 15)])
def test_epochs_become_steps_as_in_transformers(epochs: float, steps: int) -> None:
    assert Schedule.of(RewardConfig(num_train_epochs=epochs), 13).num_steps == steps
    assert steps == math.ceil(epochs * 13)


def test_max_steps_overrides_epochs() -> None:
    assert Schedule.of(RewardConfig(num_train_epochs=3, max_steps=5), 13).num_steps == 5
