"""What scripts do with a trainer around training, in this process: before it, after it, going on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import RunDirectoryError
from rayrm.metrics.names import logged_names
from rayrm.model.reward_model import load_saved
from tests.hub_server import hub_server
from tests.numerics.ranks import tokenized
from tests.tiny import tiny_model, tiny_tokenizer


def trainer(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> RewardTrainer:
    usual = {"max_steps": 3, "bf16": False, "use_cpu": True, "learning_rate": 1e-2, "logging_steps": 1}
    return RewardTrainer(
        tiny_model(seed=1),
        RewardConfig(str(output_dir), **{**usual, **settings}),
        train_dataset=TokenizedSet.from_rows(tokenized(16)),
        eval_dataset=TokenizedSet.from_rows(tokenized(8)),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def test_a_script_may_look_at_the_model_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ours = trainer(run, save_strategy="no")
    before = ours.evaluate()
    ours.log_metrics("eval", before)
    ours.save_metrics("eval", before)
    ours.save_state()
    ours.save_model(ours.args.output_dir)
    assert "eval metrics" in capsys.readouterr().out
    assert (before["epoch"], before["eval_num_tokens"]) == (0, 0)
    for name in ("eval_results.json", "all_results.json"):
        assert json.loads((run / name).read_text()) == before
    state = TrainerState.load_from_json(str(run / "trainer_state.json"))
    assert (state.global_step, state.log_history) == (0, [{**before, "step": 0}])
    saved = load_saved(run).model.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in ours.model.state_dict().items())
    ours.train()
    assert ours.evaluate()["eval_loss"] != before["eval_loss"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "trainer_state.json").write_text("precious")
    other = trainer(tmp_path / "foreign", save_strategy="no")
    other.save_metrics("eval", before)
    with pytest.raises(RunDirectoryError, match=r"trainer_state\.json"):
        other.train()


def test_a_model_may_be_pushed_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server(monkeypatch) as hub:
        ours = trainer(tmp_path / "run", save_strategy="no", hub_token="hf_secret_of_this_test")
        ours.push_to_hub(dataset_name="org/pairs")
    (commit,) = hub.commits
    assert ours.hub_model_id == commit.repo == "me/run"
    assert commit.files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    card = commit.files["README.md"].decode()
    assert "- org/pairs" in card
    assert 'from_pretrained("me/run"' in card
    assert ours.train().global_step == 3


class Watches(TrainerCallback):
    def __init__(self) -> None:
        self.states: list[TrainerState] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        self.states.append(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        self.states.append(state)


def test_the_state_at_the_end_is_one_for_callbacks_scripts_and_files(tmp_path: Path) -> None:
    watches = Watches()
    ours = trainer(
        tmp_path / "run", watches, max_steps=5, per_device_train_batch_size=4, num_train_epochs=7,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    output = ours.train()
    state = ours.state
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (5, 5, 2)  # 4 steps an epoch
    assert (state.logging_steps, state.eval_steps, state.save_steps, state.train_batch_size) == (1, 2, 2, 4)
    assert state.epoch == 1.25
    losses = {r["step"]: r["eval_loss"] for r in state.log_history if "eval_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert (state.best_global_step, state.best_metric) == (best, losses[best])
    assert state.best_model_checkpoint == str(tmp_path / f"run/checkpoint-{best}")
    assert state.num_input_tokens_seen == output.metrics["num_tokens"] > 0
    assert state.log_history[-1]["train_loss"] == output.training_loss
    assert {key for record in state.log_history for key in record} - {"step"} <= {*logged_names([""], [])}
    # What callbacks keep, here the flags alone, stands in files.
    assert watches.states[-1].stateful_callbacks == {}
    assert list(state.stateful_callbacks) == ["TrainerControl"]
    seen = {**dataclasses.asdict(watches.states[-1]), "stateful_callbacks": state.stateful_callbacks}
    assert seen == dataclasses.asdict(state)
    assert TrainerState.load_from_json(str(tmp_path / "run/trainer_state.json")) == state
    within = TrainerState.load_from_json(str(tmp_path / "run/checkpoint-4/trainer_state.json"))
    moved = {"log_history", "global_step", "epoch", "num_input_tokens_seen", "stateful_callbacks"}
    told, ended = (dataclasses.asdict(one) for one in (within, state))
    assert {key for key in ended if ended[key] != told[key] and not key.startswith("best_")} == moved
    assert state.log_history[: len(within.log_history)] == within.log_history


def test_a_run_goes_on_from_a_path(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_steps=2)
    whole.train()
    again = trainer(tmp_path / "again", save_steps=2)
    # Elsewhere there is no run, so that True would be refused.
    output = again.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert output.global_step == 3
    assert [record["step"] for record in again.state.log_history] == [1, 2, 3, 3]
    assert again.state.log_history[:2] == whole.state.log_history[:2]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


@pytest.mark.gpu
def test_the_model_is_on_the_device_before_it_trains(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "run", use_cpu=False)
    assert ours.model.device.type == "cuda"
    assert ours.evaluate()["eval_loss"] > 0
    assert trainer(tmp_path / "cpu").model.device.type == "cpu"
