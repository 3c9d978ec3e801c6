"""A source of pairs, soft labels, ties, rankings and scores: read, trained on, evaluated, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm import RewardConfig, RewardTrainer
from rayrm.config import DataConfig
from rayrm.errors import DataError
from rayrm.evaluation.evaluate import evaluate_model
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of each kind in turn; what is scored 2 is what pairs prefer, the rest has -2."""
    rows: list[dict[str, Any]] = []
    for place, row in enumerate(tiny_rows(count, seed=seed)):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        rows.append(
            [
                row,
                {**row, "target": 0.9},
                {"prompt": prompt, "chosen": chosen, "rejected": chosen + " .", "tie": True},
                {"prompt": prompt, "completions": [rejected, chosen], "ranks": [1, 0]},
                {"prompt": prompt, "completion": chosen, "score": 2.0},
                {"prompt": prompt, "completions": [rejected, chosen], "scores": [-2.0, 2.0]},
            ][place % 6]
        )
    return rows


def settings(directory: Path, **changes: Any) -> RewardConfig:
    return RewardConfig(
        str(directory),
        **{
            "max_steps": 24,
            "per_device_train_batch_size": 12,
            "learning_rate": 3e-3,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 4,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 24,
            "eval_on_start": True,
            "tie_model": "davidson",
            "pointwise_loss": "mse",
            **changes,
        },
    )


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_a_set_of_all_kinds_trains_and_is_measured_by_kind(tmp_path: Path, mode: Any) -> None:
    train, held_out = labelled(96, seed=1), labelled(36, seed=2)
    source: Any = train
    if mode == "streaming":
        source = str(tmp_path / "rows.jsonl")
        Path(source).write_text("".join(json.dumps(row) + "\n" for row in train))
    trainer = RewardTrainer(
        tiny_model(seed=1),
        settings(tmp_path / "run"),
        train_dataset=source,
        eval_dataset=held_out,
        processing_class=tiny_tokenizer(),
        data_config=DataConfig(mode=mode),
    )
    trainer.train()
    found = [record for record in trainer.state.log_history if "eval_loss" in record]
    before, after = found[0], found[-1]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_mse"] < 0.8 * before["eval_mse"]
    assert after["eval_accuracy"] > max(before["eval_accuracy"], 0.7)
    assert after["eval_pearson"] > 0.5
    counts = ("num_rows", "num_pairs", "num_ties", "num_rated")
    assert [after[f"eval_{name}"] for name in counts] == [36, 24, 6, 18]
    steps = [record for record in trainer.state.log_history if "grad_norm" in record]
    assert steps[-1]["mse"] < steps[0]["mse"]
    predicted = trainer.predict(held_out).predictions
    assert predicted.shape == (36, 2)
    assert np.isnan(predicted).sum() == 6
    if mode == "indexed":
        # By the objective that the saved model keeps: the figures of the run's own evaluation.
        (metrics,) = evaluate_model(tmp_path / "run", [held_out]).values()
        assert metrics.keys() == {key.removeprefix("eval_") for key in after} & metrics.keys()
        assert metrics == pytest.approx({key: after[f"eval_{key}"] for key in metrics}, rel=1e-4)
        assert metrics["num_ties"] == 6
        (other,) = evaluate_model(tmp_path / "run", [held_out], objective={"tie_parameter": 3.0}).values()
        assert other["accuracy"] == metrics["accuracy"]
        assert other["loss"] != pytest.approx(metrics["loss"], rel=1e-3)


def test_a_run_that_is_not_told_to_learn_from_them_refuses_them_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        RewardTrainer(
            tiny_model(seed=1),
            RewardConfig(str(tmp_path / "run"), use_cpu=True),
            train_dataset=labelled(12, seed=1),
            processing_class=tiny_tokenizer(),
        )
    for words in ("not-pointwise x 4", "all-tied x 2", "`pointwise_loss=mse`", "`tie_model=davidson`"):
        assert words in str(refusal.value)


def rated(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs, single completions and several, in turn; what pairs prefer is rated 2, what they reject -2."""
    rows: list[dict[str, Any]] = []
    for place, row in enumerate(tiny_rows(count, seed=seed)):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        good, bad = {"good": 2.0, "odd": place % 3}, {"good": -2.0}
        rows.append(
            [
                row,
                {**row, "chosen_attributes": good, "rejected_attributes": bad},
                {"prompt": prompt, "completion": chosen, "attributes": good},
                {"prompt": prompt, "completions": [rejected, chosen], "attributes": [bad, None]},
            ][place % 4]
        )
    return rows


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_a_set_that_rates_by_attribute_trains_is_measured_and_goes_on(tmp_path: Path, mode: Any) -> None:
    train, held_out = str(tmp_path / "rows.jsonl"), rated(32, seed=2)
    Path(train).write_text("".join(json.dumps(row) + "\n" for row in rated(96, seed=1)))
    objective = {
        "attributes": ["good", "odd"],
        "attribute_weight": 0.9,
        "tie_model": "none",
        "pointwise_loss": "none",
    }

    def trainer(directory: str, model: Any) -> RewardTrainer:
        return RewardTrainer(
            model,
            settings(tmp_path / directory, **objective),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tiny_tokenizer(),
            data_config=DataConfig(mode=mode, token_cache=str(tmp_path / "cache")),
        )

    first = trainer("run", tiny_model(seed=1))
    first.train()
    before, after = (
        [record for record in first.state.log_history if "eval_loss" in record][place] for place in (0, -1)
    )
    assert after["eval_attribute_mse_good"] < 0.8 * before["eval_attribute_mse_good"]
    assert after["eval_attribute_pearson_good"] > 0.5
    assert after["eval_accuracy"] > max(before["eval_accuracy"], 0.6)
    steps = [record for record in first.state.log_history if "grad_norm" in record]
    assert [step["gate_good"] + step["gate_odd"] for step in steps] == pytest.approx([1] * len(steps))
    # The trainer's model has its own head again, and the heads beside it.
    assert first.model.score.weight.requires_grad
    measured = first.evaluate()
    assert measured["eval_attribute_mse_good"] == pytest.approx(after["eval_attribute_mse_good"], rel=1e-5)
    assert measured["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)
    assert first.predict(held_out).predictions.shape == (32, 2)
    if mode == "indexed":
        (metrics,) = evaluate_model(tmp_path / "run", [held_out]).values()
        for name in ("loss", "attribute_mse_good", "attribute_pearson_odd", "accuracy"):
            assert metrics[name] == pytest.approx(after[f"eval_{name}"], rel=1e-4), name
        again = trainer("again", str(tmp_path / "run")).evaluate()
        assert again["eval_attribute_mse_good"] == pytest.approx(after["eval_attribute_mse_good"], rel=1e-4)


def test_ratings_that_a_run_cannot_use_are_refused_by_name(tmp_path: Path) -> None:
    def refused(rows: list[dict[str, Any]], **changes: Any) -> str:
        with pytest.raises(DataError) as refusal:
            RewardTrainer(
                tiny_model(seed=1),
                RewardConfig(str(tmp_path / "run"), use_cpu=True, **changes),
                train_dataset=rows,
                processing_class=tiny_tokenizer(),
            )
        return str(refusal.value)

    assert "no-attributes x 6" in refused(rated(12, seed=1))
    told = refused(rated(12, seed=1), attributes=["god"])
    assert "bad-attributes x 9" in told
    assert "`god`" in told
    assert "none of all 3 rows" in refused(rated(12, seed=1)[::4], attributes=["good"])
