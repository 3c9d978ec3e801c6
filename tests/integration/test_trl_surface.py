"""A trainer has what TRL's scripts and tests ask of it: arguments, attributes, methods, names of metrics."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError
from tests.integration.test_trl_scripts import OfThisMachine
from tests.tiny import tiny_model, tiny_rankings, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "use_cpu": True,
    "logging_steps": 1,
}  # fmt: skip


def test_the_constructor_has_trls_arguments_in_its_order() -> None:
    theirs, ours = (
        list(inspect.signature(of.__init__).parameters) for of in (trl.RewardTrainer, RewardTrainer)
    )
    assert ours[: len(theirs)] == theirs


@pytest.fixture(scope="module")
def both(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RewardTrainer]:
    """TRL's trainer and ours on the same rows, trained."""
    root = tmp_path_factory.mktemp("surface")
    rows = tiny_rows(16, conversational=True)
    sets = {"a": tiny_rows(6, seed=6, conversational=True), "b": tiny_rows(4, seed=7, conversational=True)}
    theirs = trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=OfThisMachine(str(root / "theirs"), **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        eval_dataset={name: Dataset.from_list(part) for name, part in sets.items()},
        processing_class=tiny_tokenizer(),
    )
    ours = RewardTrainer(
        model=tiny_model(seed=1),
        args=RewardConfig(str(root / "ours"), **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        eval_dataset={name: Dataset.from_list(part) for name, part in sets.items()},
        processing_class=tiny_tokenizer(),
    )
    for trainer in (theirs, ours):
        trainer.train()
    return theirs, ours


def test_the_tokenized_rows_are_trls(both: tuple[Any, RewardTrainer]) -> None:
    theirs, ours = both
    assert set(ours.train_dataset.column_names) == {"chosen_ids", "rejected_ids"}
    assert set(ours.train_dataset.column_names) <= set(theirs.train_dataset.column_names)
    assert len(ours.train_dataset) == len(theirs.train_dataset) == 16
    for place in (0, 5, -1):
        for key in ("chosen_ids", "rejected_ids"):
            assert ours.train_dataset[place][key] == theirs.train_dataset[place][key]
    for key in ("chosen_ids", "rejected_ids"):
        assert list(ours.train_dataset[key]) == list(theirs.train_dataset[key])
        assert ours.train_dataset[2:5][key] == theirs.train_dataset[2:5][key]
        assert ours.train_dataset[[3, 1]][key] == theirs.train_dataset[[3, 1]][key]
    assert ours.predict(ours.train_dataset).metrics["test_num_pairs"] == 16
    assert list(ours.eval_dataset) == ["a", "b"]
    with pytest.raises(IndexError):
        ours.train_dataset[16]


def test_the_log_has_every_name_of_trls_and_its_order(both: tuple[Any, RewardTrainer]) -> None:
    theirs, ours = (trainer.state.log_history for trainer in both)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for expected, found in zip(theirs, ours, strict=True):
        # TRL gives the set's name to its loss and speed alone: of two sets `eval_accuracy` is either's.
        plain = {key.replace("eval_a_", "eval_").replace("eval_b_", "eval_") for key in found}
        named = {key.replace("eval_a_", "eval_").replace("eval_b_", "eval_") for key in expected}
        assert named - plain <= {"total_flos"}, expected
    assert ours[-2]["eval_b_runtime"] > 0


def test_the_state_at_the_end_is_trls(both: tuple[Any, RewardTrainer]) -> None:
    theirs, ours = (trainer.state for trainer in both)
    for name in (
        "global_step", "epoch", "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps",
        "train_batch_size", "best_metric", "best_global_step", "best_model_checkpoint",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


def test_what_a_script_calls_when_it_ends(
    both: tuple[Any, RewardTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    _, trainer = both
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.accelerator.print("done")
    trainer.end()
    said = capsys.readouterr().out
    assert "eval metrics" in said
    assert "done" in said
    kept = Path(str(trainer.args.output_dir))
    assert json.loads((kept / "eval_results.json").read_text())["eval_a_loss"] == metrics["eval_a_loss"]
    state = json.loads((kept / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (2, 2)
    assert state["log_history"] == trainer.state.log_history
    with pytest.raises(AttributeError, match="rayrm trains without accelerate"):
        trainer.accelerator.gather([])


def test_rankings_show_their_ranks(ray_cluster: None, tmp_path: Path) -> None:
    trainer = RewardTrainer(
        tiny_model(),
        RewardConfig(str(tmp_path)),
        train_dataset=tiny_rankings(3),
        processing_class=tiny_tokenizer(),
    )
    row = trainer.train_dataset[0]
    assert sorted(row) == ["completion_ids", "ranks"]
    assert len(row["completion_ids"]) == len(row["ranks"])
    assert trainer.eval_dataset is None


def test_one_of_the_sets_is_evaluated_by_its_name(both: tuple[Any, RewardTrainer]) -> None:
    theirs, ours = both
    told = {key.replace("eval_a_", "eval_") for key in ours.evaluate("a")}
    assert set(theirs.evaluate("a")) - {"eval_model_preparation_time"} <= told
    theirs.state.log_history.pop()
    for found in (ours.evaluate("a"), ours.evaluate()):
        assert found["eval_a_loss"] == pytest.approx(theirs.state.log_history[-3]["eval_a_loss"], abs=1e-4)
    assert "eval_b_loss" not in ours.evaluate("a")


def test_what_only_transformers_trainer_has_is_named_with_what_stands_for_it(
    both: tuple[Any, RewardTrainer],
) -> None:
    with pytest.raises(AttributeError, match="no `compute_loss`: the loss is Bradley-Terry's"):
        _ = both[1].compute_loss
    with pytest.raises(AttributeError, match=r"no `surprise`[.]"):
        _ = both[1].surprise
    with pytest.raises(ConfigError, match=r"`trial` is not supported.*rayrm sweep"):
        both[1].train(trial=object())  # type: ignore[arg-type]
