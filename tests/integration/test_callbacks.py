"""transformers' callbacks are called as TRL's trainer calls them, and decide what they decide there."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from ray.train import ScalingConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 2,
}
BY_STEPS = {
    "max_steps": 7,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
}
BY_EPOCHS = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
EVENTS = (
    "init_end", "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "log",
    "evaluate", "save", "predict", "pre_optimizer_step", "optimizer_step",
)  # fmt: skip


class Recorder(TrainerCallback):
    """Every event with the step at which it came, and which metrics came along."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []


def _recorded(event: str) -> Any:
    def on(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        told = sorted({**(given.get("logs") or {}), **(given.get("metrics") or {})})
        known = {"loss", "grad_norm", "learning_rate", "accuracy", "eval_loss", "eval_accuracy", "train_loss"}
        self.seen.append((event, state.global_step, state.max_steps, *(key for key in told if key in known)))

    return on


for name in EVENTS:
    setattr(Recorder, f"on_{name}", _recorded(name))


def trainer_of(directory: Path, callbacks: list[Any], *, rows: int = 16, **settings: Any) -> RewardTrainer:
    scaling = settings.pop("scaling_config", None)
    return RewardTrainer(
        tiny_model(seed=1),
        RewardConfig(str(directory), **{**SETTINGS, **settings}),
        train_dataset=tiny_rows(rows),
        eval_dataset=tiny_rows(8, seed=6),
        processing_class=tiny_tokenizer(bos=True),
        callbacks=callbacks,
        scaling_config=scaling,
    )


@pytest.mark.parametrize("settings", [BY_STEPS, BY_EPOCHS], ids=["steps", "epochs"])
def test_events_come_in_trls_order_with_its_metrics(
    ray_cluster: None, tmp_path: Path, settings: dict[str, Any]
) -> None:
    theirs, ours = Recorder(), Recorder()
    reference = trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=trl.RewardConfig(str(tmp_path / "theirs"), **SETTINGS, **settings),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        eval_dataset=Dataset.from_list(tiny_rows(8, seed=6)),
        processing_class=tiny_tokenizer(bos=True),
        callbacks=[theirs],
    )
    reference.train()
    reference.evaluate()
    trainer = trainer_of(tmp_path / "ours", [ours], **settings)
    trainer.train()
    trainer.evaluate()
    assert ours.seen == theirs.seen


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class SavesOnlyAt(TrainerCallback):
    """Vetoes what the settings save, and saves another step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.found: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_save = state.global_step == self.step

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors"
        self.found.append(place.is_file())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_a_callback_stops_is_finished_and_saved(
    ray_cluster: None, tmp_path: Path, num_workers: int
) -> None:
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}) if num_workers else None
    trainer = trainer_of(
        tmp_path / "run", [StopsAt(2)], max_steps=5, save_strategy="no", rows=32, scaling_config=scaling
    )
    output = trainer.train()
    assert output.global_step == 2
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["finished"]


def test_what_a_callback_vetoes_is_not_saved_and_what_it_wants_is_on_disk_when_it_is_told(
    ray_cluster: None, tmp_path: Path
) -> None:
    saves = SavesOnlyAt(2)
    trainer_of(tmp_path / "run", [saves], max_steps=4, save_strategy="steps", save_steps=3).train()
    assert [place.name for place in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert saves.found == [True]


class AsksWhenLogged(TrainerCallback):
    """Asks for what is not in the settings, and writes each update down."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **given: Any) -> None:
        if "loss" in logs and state.global_step == 2:
            control.should_evaluate = control.should_save = True
        control.should_training_stop = "loss" in logs and state.global_step == 3

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._write(args, "before", state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._write(args, "after", state.global_step)

    def _write(self, args: Any, *words: Any) -> None:
        with (Path(args.output_dir) / "updates.jsonl").open("a") as out:
            out.write(json.dumps([args.process_index, *words]) + "\n")


@pytest.mark.parametrize("zero_stage", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_all_ranks_do_what_a_callback_asks_for_when_it_is_told_of_a_log(
    ray_cluster: None, tmp_path: Path, zero_stage: int | None
) -> None:
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
    trainer = trainer_of(
        tmp_path / "run", [AsksWhenLogged], max_steps=4, logging_steps=1, save_strategy="no", rows=32,
        zero_stage=zero_stage, scaling_config=scaling,
    )  # fmt: skip
    assert trainer.train().global_step == 3
    assert [place.name for place in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [record["step"] for record in trainer.state.log_history if "eval_loss" in record] == [2]
    updates = [json.loads(line) for line in (tmp_path / "run" / "updates.jsonl").read_text().splitlines()]
    assert updates == [[0, when, step] for step in range(3) for when in ("before", "after")]


class Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        raise RuntimeError("no more")


def test_an_error_of_a_callback_ends_all_ranks(ray_cluster: None, tmp_path: Path) -> None:
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
    trainer = trainer_of(tmp_path / "run", [Fails], max_steps=3, rows=32, scaling_config=scaling)
    with pytest.raises(Exception, match="no more"):
        trainer.train()


def test_early_stopping_stops_where_trl_does_also_when_it_was_resumed(
    ray_cluster: None, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 12, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "metric_for_best_model": "loss", "load_best_model_at_end": True,
    }  # fmt: skip
    patient = {"early_stopping_patience": 3, "early_stopping_threshold": 1.0}
    reference = trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=trl.RewardConfig(str(tmp_path / "theirs"), **SETTINGS, **settings),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        eval_dataset=Dataset.from_list(tiny_rows(8, seed=6)),
        processing_class=tiny_tokenizer(bos=True),
        callbacks=[EarlyStoppingCallback(**patient)],
    )
    reference.train()
    stopped = reference.state.global_step
    assert 2 < stopped < 12
    whole = trainer_of(tmp_path / "whole", [EarlyStoppingCallback(**patient)], **settings)
    assert whole.train().global_step == stopped
    with pytest.raises(RuntimeError, match="no more"):
        trainer_of(tmp_path / "cut", [EarlyStoppingCallback(**patient), FailsAt(2)], **settings).train()
    again = trainer_of(tmp_path / "cut", [EarlyStoppingCallback(**patient)], **settings)
    assert again.train(resume_from_checkpoint=True).global_step == stopped


class FailsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("no more")


class Substeps(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        raise AssertionError


def test_what_is_no_callback_or_needs_an_event_that_never_comes_is_refused(
    ray_cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"Substeps has an `on_substep_end`, which would never be called"):
        trainer_of(tmp_path / "a", [Substeps])
    with pytest.raises(ConfigError, match=r"`callbacks` has a int"):
        trainer_of(tmp_path / "b", [3])
    holds = StopsAt(1)
    holds.lock = threading.Lock()  # type: ignore[attr-defined]
    two = ScalingConfig(num_workers=2)
    with pytest.raises(ConfigError, match=r"`callbacks\[1\]` \(StopsAt\) cannot be sent to workers"):
        trainer_of(tmp_path / "c", [StopsAt(2), holds], scaling_config=two)
