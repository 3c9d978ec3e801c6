"""Settings of TRL's scripts that reach beyond a step: hub, best checkpoint, order, collator, names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from trl.trainer.reward_trainer import DataCollatorForPreference

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError
from rayrm.train.records import read_records
from tests.hub_server import hub_server
from tests.tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
TOKEN = "hf_secret_of_this_test"
SETTINGS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2,
    "learning_rate": 1e-3, "disable_tqdm": True, "bf16": False, "use_cpu": True,
}  # fmt: skip
MakeTrainer = Callable[..., RewardTrainer]


@pytest.fixture
def trainer_of(ray_cluster: None, tmp_path: Path) -> MakeTrainer:
    def make(name: str = "run", model: Any = None, **fields: Any) -> RewardTrainer:
        given = {
            key: fields.pop(key) for key in ("data_collator", "callbacks", "eval_dataset") if key in fields
        }
        rows = fields.pop("train_dataset", None) or Dataset.from_list(tiny_rows(16))
        tokenizer = None if isinstance(model, str) else tiny_tokenizer()
        return RewardTrainer(
            tiny_model(seed=1) if model is None else model,
            RewardConfig(str(tmp_path / name), **{**SETTINGS, **fields}),
            train_dataset=rows,
            processing_class=tokenizer,
            **given,
        )

    return make


def test_the_model_is_pushed_with_each_checkpoint_and_at_the_end(
    trainer_of: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pushes(TrainerCallback):
        begun = 0

        def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
            type(self).begun += 1

    settings = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "me/reward"}
    with hub_server(monkeypatch) as hub:
        trainer = trainer_of(**settings, callbacks=[Pushes])
        assert trainer.hub_model_id == "me/reward"
        assert len(hub.created) == 1  # before training, so that a wrong token ends nothing
        trainer.train()
        messages = [commit.message for commit in hub.commits]
        assert messages[0] == "Training in progress, step 2"
        assert messages[-1] == "End of training"
        saved = (tmp_path / "run/model.safetensors").read_bytes()
        assert (
            hub.commits[-1].files["model.safetensors"] == saved != hub.commits[0].files["model.safetensors"]
        )
        trainer.push_to_hub(dataset_name="org/pairs")
        assert b"org/pairs" in hub.commits[-1].files["README.md"]
        assert Pushes.begun == 2
        assert hub.tokens == {f"Bearer {TOKEN}"}
        before = len(hub.commits)
        trainer_of("other", **settings, hub_strategy="end").train()
        assert [commit.message for commit in hub.commits[before:]] == ["End of training"]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_only_checkpoints_that_are_the_best_so_far_are_saved(trainer_of: MakeTrainer, tmp_path: Path) -> None:
    """A learning rate that soon ruins the model, so that later evaluations are worse."""
    trainer = trainer_of(
        max_steps=8, learning_rate=0.3, eval_strategy="steps", eval_steps=1, eval_delay=2,
        save_strategy="best", metric_for_best_model="loss", load_best_model_at_end=True,
        eval_dataset=tiny_rows(12, seed=5),
    )  # fmt: skip
    trainer.train()
    evaluated = {r["step"]: r["eval_loss"] for r in read_records(tmp_path / "run") if "eval_loss" in r}
    assert list(evaluated) == list(range(2, 9))
    best = [
        step for step, loss in evaluated.items() if loss <= min(evaluated[n] for n in range(2, int(step) + 1))
    ]
    assert 0 < len(best) < 7
    assert sorted(file.name for file in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in best
    ]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"run/checkpoint-{best[-1]}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated.values()), abs=1e-5)
    state = TrainerState.load_from_json(str(tmp_path / f"run/checkpoint-{best[-1]}/trainer_state.json"))
    assert (state.global_step, state.max_steps, state.best_metric) == (best[-1], 8, min(evaluated.values()))
    assert state.log_history[-1]["eval_loss"] == evaluated[best[-1]]


def test_sequential_is_the_datas_own_order_and_trls_collator_is_taken(
    trainer_of: MakeTrainer, tmp_path: Path
) -> None:
    collator = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=16)
    trainer = trainer_of(
        "a", train_sampling_strategy="sequential", save_strategy="no", data_collator=collator
    )
    assert trainer.args.pad_to_multiple_of == 16
    trainer.train()
    trainer_of("b", shuffle=False, save_strategy="no").train()
    trainer_of("c", save_strategy="no").train()
    losses = {n: [r["loss"] for r in read_records(tmp_path / n) if "loss" in r] for n in "abc"}
    assert len(losses["a"]) == 4
    assert losses["a"] == losses["b"] != losses["c"]
    with pytest.raises(ConfigError, match=r"`data_collator` pads with 7, and the tokenizer's pad token is 0"):
        trainer_of("d", data_collator=DataCollatorForPreference(pad_token_id=7))
    with pytest.raises(ConfigError, match=r"`data_collator` \(function\) is not supported"):
        trainer_of("d", data_collator=lambda rows: rows)


def test_names_are_there_when_the_trainer_is_made(trainer_of: MakeTrainer, tmp_path: Path) -> None:
    """Tags on the model; the EOS of the tokenizer whose template is taken, in the model's config."""
    template = tiny_tokenizer()
    template.eos_token = "<|end|>"
    template.save_pretrained(tmp_path / "template")
    model = str(save_tiny(tmp_path / "model"))
    trainer = trainer_of(
        model=model,
        chat_template_path=str(tmp_path / "template"),
        train_dataset=Dataset.from_list(tiny_rows(16, conversational=True)),
    )
    assert {"reward-trainer", "rayrm"} <= set(trainer.model.model_tags)
    end = template.convert_tokens_to_ids("<|end|>")
    assert trainer.processing_class.eos_token == "<|end|>"
    assert trainer.model.config.eos_token_id == end
    theirs = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none",
                              chat_template_path=str(tmp_path / "template")),
        train_dataset=Dataset.from_list(tiny_rows(16, conversational=True)),
    )  # fmt: skip
    assert theirs.model.config.eos_token_id == end


def test_old_column_names_are_warned_of_where_the_trainer_is_made(trainer_of: MakeTrainer) -> None:
    rows = [{"chosen_input_ids": [5, 6 + n], "rejected_input_ids": [5, 7 + n]} for n in range(8)]
    with pytest.warns(FutureWarning, match="old names of `chosen_ids`/`rejected_ids`"):
        trainer = trainer_of(train_dataset=Dataset.from_list(rows))
    assert json.dumps(trainer.train_dataset[1]["chosen_ids"]) == "[5, 7]"
