"""`compute_metrics` and `preprocess_logits_for_metrics` get and give what they do in TRL's trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from datasets import Dataset
from ray.train import ScalingConfig
from transformers import EvalPrediction

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}


class Seen:
    """Keeps what it is given: two batches of three rows."""

    def __init__(self) -> None:
        self.predictions: list[np.ndarray] = []
        self.labels: list[Any] = []

    def __call__(self, given: EvalPrediction) -> dict[str, Any]:
        self.predictions.append(np.asarray(given.predictions))
        self.labels.append(given.label_ids)
        return {"p10": np.quantile(given.predictions, 0.1), "eval_top": np.float32(given.predictions.max())}


def halved(logits: Any, labels: Any) -> Any:
    return logits / 2


def p10(given: EvalPrediction) -> dict[str, float]:
    return {"p10": float(np.quantile(given.predictions, 0.1))}


@pytest.mark.parametrize("preprocess", [None, halved])
def test_it_gets_trls_predictions_and_its_metrics_are_logged_as_trls(
    ray_cluster: None, tmp_path: Path, preprocess: Any
) -> None:
    # Of a short last batch TRL's loop keeps only as many scores as it has rows, half of them.
    train, evaluation = tiny_rows(16), tiny_rows(6, seed=6)
    theirs, ours = Seen(), Seen()
    settings = {**SETTINGS, "train_sampling_strategy": "sequential"}
    reference = trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=trl.RewardConfig(str(tmp_path / "theirs"), **settings),
        train_dataset=Dataset.from_list(train),
        eval_dataset={"a": Dataset.from_list(evaluation)},
        processing_class=tiny_tokenizer(bos=True),
        compute_metrics=theirs,
        preprocess_logits_for_metrics=preprocess,
    )
    reference.train()
    trainer = RewardTrainer(
        tiny_model(seed=1),
        RewardConfig(str(tmp_path / "ours"), shuffle=False, metric_for_best_model="a_p10", **SETTINGS),
        train_dataset=train,
        eval_dataset={"a": evaluation},
        processing_class=tiny_tokenizer(bos=True),
        compute_metrics=ours,
        preprocess_logits_for_metrics=preprocess,
    )
    trainer.train()
    assert len(theirs.predictions) == len(ours.predictions) == 2
    for expected, found in zip(theirs.predictions, ours.predictions, strict=True):
        assert found.shape == expected.shape == (12, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ours.labels == theirs.labels
    for key in ("eval_a_p10", "eval_a_eval_top"):
        expected, found = (
            [record[key] for record in log if key in record]
            for log in (reference.state.log_history, trainer.state.log_history)
        )
        assert len(found) == 2
        assert found == pytest.approx(expected, abs=1e-4)
    kept = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_a_p10" in record for record in kept) == 2
    found_in_training = trainer.state.log_history[-2]["eval_a_p10"]
    assert trainer.evaluate()["eval_a_p10"] == pytest.approx(found_in_training)
    assert trainer.predict(evaluation).metrics["test_p10"] == pytest.approx(
        np.quantile(ours.predictions[-1], 0.1)
    )


def test_workers_compute_it_too(ray_cluster: None, tmp_path: Path) -> None:
    trainer = RewardTrainer(
        tiny_model(seed=1),
        RewardConfig(str(tmp_path / "run"), **SETTINGS),
        train_dataset=tiny_rows(16),
        eval_dataset=tiny_rows(7, seed=6),
        processing_class=tiny_tokenizer(bos=True),
        compute_metrics=p10,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
    )
    trainer.train()
    told = [record["eval_p10"] for record in trainer.state.log_history if "eval_p10" in record]
    assert len(told) == 2
    assert told[-1] == pytest.approx(trainer.evaluate()["eval_p10"], abs=1e-5)


@pytest.mark.parametrize("given", [0.5, {"a": [1, 2]}, {"a": "good"}, {3: 1.0}], ids=str)
def test_what_is_no_table_of_numbers_is_told(ray_cluster: None, tmp_path: Path, given: Any) -> None:
    trainer = RewardTrainer(
        tiny_model(),
        RewardConfig(str(tmp_path / "run"), **SETTINGS),
        train_dataset=tiny_rows(8),
        eval_dataset=tiny_rows(4),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda prediction: given,
    )
    with pytest.raises(ConfigError, match="must return a dict of numbers by name"):
        trainer.evaluate()
