"""What callbacks ask for is done as transformers' trainer does it, and what they keep is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train.callbacks import CallbackArgs, call_all
from rayrm.train.checkpoint import TrainState, checkpoints, read_state
from rayrm.train.evaluation import note_checkpoint, note_metric
from rayrm.train.rank import Rank
from rayrm.train.records import read_progress, read_records
from rayrm.train.user_metrics import UserMetrics
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Variant, job_of, tokenized
from tests.tiny import saved_weights, tiny_model, tiny_rows, tiny_tokenizer

ROWS = 16
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
EVENTS = (
    "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "log", "evaluate",
    "save", "pre_optimizer_step", "optimizer_step",
)  # fmt: skip


def train(home: Path, *callbacks: TrainerCallback, evaluates: bool = True, **settings: Any) -> Path:
    changes = {name: settings.pop(name) for name in ("resume", "metrics") if name in settings}
    variant = Variant("x", {"center_rewards_coefficient": None, **SETTINGS, **settings}, evaluates=evaluates)
    job = job_of(variant, home, tokenized(ROWS))
    train_rank(replace(job, callbacks=callbacks, **changes), lambda _: None)
    return home


class Asks(TrainerCallback):
    """At an event of a step asks for what `plan` has; notes every event, and whether training then stops."""

    def __init__(self, plan: dict[tuple[str, int], tuple[str, ...]]) -> None:
        self.plan = plan
        self.seen: list[tuple[Any, ...]] = []


def _event(event: str) -> Any:
    def on(self: Asks, args: Any, state: Any, control: Any, **given: Any) -> None:
        told = {*(given.get("logs") or {}), *(given.get("metrics") or {})}
        known = sorted(told & {"loss", "grad_norm", "eval_loss", "train_loss", "epoch"})
        self.seen.append((event, state.global_step, control.should_training_stop, *known))
        for name in self.plan.get((event, state.global_step), ()):
            setattr(control, f"should_{name}", True)

    return on


for event in EVENTS:
    setattr(Asks, f"on_{event}", _event(event))

PLANS: dict[str, list[dict[tuple[str, int], tuple[str, ...]]]] = {
    "nothing": [{}],
    "a log asks to evaluate and to save": [{("log", 2): ("evaluate", "save")}],
    "a log asks to stop": [{("log", 2): ("training_stop",)}],
    "an evaluation asks to save": [{("evaluate", 3): ("save",)}],
    "a step asks as it begins": [{("step_begin", 0): ("log", "save")}],
    "an update asks": [{("optimizer_step", 0): ("evaluate",), ("pre_optimizer_step", 2): ("save",)}],
    "an epoch asks as it begins, which the step takes back": [{("epoch_begin", 4): ("save",)}],
    "an epoch asks as it ends": [{("epoch_end", 4): ("log", "evaluate", "save")}],
    "a checkpoint asks": [{("save", 4): ("evaluate",), ("save", 6): ("log", "training_stop")}],
    "two ask": [{("step_end", 1): ("save",)}, {("step_end", 1): ("evaluate",), ("log", 4): ("save",)}],
}
BY_STEPS: dict[str, Any] = {
    "max_steps": 7, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps",
    "save_steps": 6,
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_what_callbacks_ask_for_is_done_when_transformers_trainer_does_it(tmp_path: Path, plan: str) -> None:
    theirs, ours = ([Asks(asked) for asked in PLANS[plan]] for _ in range(2))
    trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=trl.RewardConfig(str(tmp_path / "theirs"), **SETTINGS, **BY_STEPS),
        train_dataset=Dataset.from_list(tiny_rows(ROWS)),
        eval_dataset=Dataset.from_list(tiny_rows(4)),
        processing_class=tiny_tokenizer(bos=True),
        callbacks=list(theirs),
    ).train()
    train(tmp_path / "ours", *ours, **BY_STEPS)
    for expected, found in zip(theirs, ours, strict=True):
        assert found.seen == expected.seen


def test_an_evaluation_that_a_callback_asks_for_needs_a_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for an evaluation .* no `eval_dataset`"):
        train(tmp_path, Asks({("step_end", 1): ("evaluate",)}), evaluates=False, max_steps=2)
    with pytest.raises(ConfigError, match="asks for the end of the epoch"):
        train(tmp_path / "b", Asks({("step_end", 1): ("epoch_stop",)}), max_steps=2)


def test_early_stopping_needs_no_checkpoints(tmp_path: Path) -> None:
    # A threshold that nothing improves by: of the evaluations after the first two are one too many.
    patient = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1.0)
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    home = train(tmp_path, patient, **settings)
    assert read_progress(home)["step"] == 3
    assert checkpoints(home) == []


class FailsOnceStopped(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if control.should_training_stop:
            raise RuntimeError("the machine is gone")


def test_a_run_that_was_cut_off_after_it_had_stopped_trains_no_further(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss",
        "save_strategy": "steps", "save_steps": 1, "logging_steps": 2,
    }  # fmt: skip
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": 1.0}
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(tmp_path / "cut", EarlyStoppingCallback(**patience), FailsOnceStopped(), **settings)
    assert not read_progress(tmp_path / "cut")["finished"]
    asks = Asks({})
    home = train(tmp_path / "cut", EarlyStoppingCallback(**patience), asks, **settings)
    assert [event for event, *_ in asks.seen] == ["train_begin", "log", "train_end"]
    whole = train(tmp_path / "whole", EarlyStoppingCallback(**patience), **settings)
    assert read_progress(home)["step"] == read_progress(whole)["step"] == 3
    ours, theirs = saved_weights(home), saved_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The third step's was not logged.
    assert read_records(home)[-1]["train_loss"] == read_records(whole)[-1]["train_loss"]


class SeesBest(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append(state.best_metric)


def planned(values: list[float]) -> UserMetrics:
    """A metric that is each of these in turn."""
    turn: Iterator[float] = iter(values)
    return UserMetrics(lambda _: {"planned": next(turn)}, None, 4)


def test_the_best_metric_is_of_all_evaluations_and_the_best_checkpoint_of_the_checkpoints(
    tmp_path: Path,
) -> None:
    sees = SeesBest()
    settings: dict[str, Any] = {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "metric_for_best_model": "planned", "greater_is_better": False, "load_best_model_at_end": True,
    }  # fmt: skip
    values = [5.0, 4.0, 1.0, 3.0, 2.0, 6.0]
    home = train(tmp_path / "run", sees, metrics=planned(values), **settings)
    assert sees.seen == [None, 5.0, 4.0, 1.0, 1.0, 1.0]
    state = read_state(home / "checkpoint-6")
    assert (state.best_metric, state.best_checkpoint, state.best_checkpoint_metric) == (1, "checkpoint-4", 3)
    assert read_progress(home)["best_checkpoint"] == "checkpoint-4"
    kept, ended = saved_weights(home / "checkpoint-4"), saved_weights(home)
    assert all(torch.equal(kept[name], ended[name]) for name in kept)
    # Elsewhere the best of all evaluations is known on; the checkpoints there are none of this directory.
    again = SeesBest()
    other = train(
        tmp_path / "other", again, metrics=planned(values[4:]), resume=home / "checkpoint-4", **settings
    )
    assert again.seen == [1.0, 1.0]
    assert read_progress(other)["best_checkpoint"] == "checkpoint-6"


@pytest.mark.parametrize("greater", [True, False])
def test_a_metric_that_is_no_number_is_never_the_best(greater: bool) -> None:
    config = RewardConfig("x", bf16=False, metric_for_best_model="mine", greater_is_better=greater)
    state = TrainState()
    for state.step, value in enumerate([float("nan"), 2.0, float("nan")], start=1):
        assert note_metric(state, {"eval_mine": value}, config) is value
        note_checkpoint(state, value, config)
        best = None if state.step == 1 else 2.0
        assert (state.best_metric, state.best_checkpoint_metric) == (best, best)
    assert state.best_checkpoint == "checkpoint-2"


class VetoesSaves(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_save = control.should_save and state.global_step != self.step


def test_a_checkpoint_that_a_callback_vetoes_is_not_the_best(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "metric_for_best_model": "planned", "greater_is_better": False, "load_best_model_at_end": True,
    }  # fmt: skip
    home = train(tmp_path, VetoesSaves(2), metrics=planned([3.0, 1.0, 2.0]), **settings)
    assert [path.name for path in checkpoints(home)] == ["checkpoint-1", "checkpoint-3"]
    assert read_progress(home)["best_checkpoint"] == "checkpoint-3"


class WatchesUpdates(TrainerCallback):
    """The head's weights before and after each update, and whether gradients were there."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        self.before.append(model.score.weight.detach().clone())
        if model.score.weight.grad is not None:
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        self.after.append(model.score.weight.detach().clone())


@pytest.mark.parametrize("zero_stage", [None, 0, 1, 2, 3])
def test_events_of_the_update_come_once_a_step_around_it(tmp_path: Path, zero_stage: int | None) -> None:
    watches = WatchesUpdates()
    home = train(
        tmp_path, watches, max_steps=3, zero_stage=zero_stage, max_grad_norm=0.01, optim="adamw_torch"
    )
    assert len(watches.before) == len(watches.after) == 3
    for before, after in zip(watches.before, watches.after, strict=True):
        assert not torch.equal(before, after)
    for after, before in zip(watches.after, watches.before[1:], strict=False):
        assert torch.equal(before, after)
    assert all(record["grad_norm"] > 0.1 for record in read_records(home) if "loss" in record)
    if zero_stage is None:  # the embedding's gradient is held by row: what is left of the norm is below it
        assert len(watches.norms) == 3
        assert all(0 < norm <= 0.0101 for norm in watches.norms)


class Counts(TrainerCallback, ExportableState):
    """Steps, from a number on."""

    def __init__(self, first: int) -> None:
        self.first, self.count = first, first

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"first": self.first}, "attributes": {"count": self.count}}


def test_each_callback_goes_on_with_its_own_state_which_checkpoints_hold_as_transformers_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    home = train(tmp_path / "first", Counts(10), EarlyStopping(), Counts(20), **settings)
    told = json.loads((home / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    states = [{"args": {"first": n}, "attributes": {"count": n + 2}} for n in (10, 20)]
    assert told["Counts"] == states
    assert told["EarlyStopping"]["attributes"] == {"early_stopping_patience_counter": 0}
    assert told["TrainerControl"]["args"]["should_training_stop"] is False
    assert TrainerState.load_from_json(str(home / "checkpoint-2" / "trainer_state.json")).global_step == 2
    again = Counts(0), Counts(0)
    both = {**settings, "restore_callback_states_from_checkpoint": True}
    train(tmp_path / "second", *again, resume=home / "checkpoint-2", **both)
    assert [one.count for one in again] == [14, 24]
    assert [one.first for one in again] == [0, 0]
    assert "state of callbacks that are not here: EarlyStopping" in caplog.text


def test_a_state_that_is_no_json_is_refused_by_the_name_of_its_callback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"what Counts.state\(\) gives cannot be kept .* Tensor"):
        train(tmp_path, Counts(torch.ones(1)), max_steps=1, save_strategy="steps")  # type: ignore[arg-type]


class EarlyStopping(EarlyStoppingCallback):
    """Without what it wants of the settings."""

    def on_train_begin(self, *args: Any, **given: Any) -> None:
        pass


class WantsAll(TrainerCallback):
    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any, processing_class: Any, optimizer: Any,
        lr_scheduler: Any, train_dataloader: Any, eval_dataloader: Any,
    ) -> None:  # fmt: skip
        self.model = model


def test_events_outside_of_training_have_all_of_transformers_arguments() -> None:
    args = CallbackArgs(RewardConfig("x", bf16=False), Rank.here(use_cpu=True))
    wants, model = WantsAll(), object()
    call_all([wants], "on_init_end", args, TrainerState(), model=model, processing_class=None)
    assert wants.model is model


def test_transformers_own_callbacks_run(tmp_path: Path) -> None:
    board = TensorBoardCallback()
    train(tmp_path, board, max_steps=2, logging_steps=1)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
