"""`RewardTrainer` on real Ray Train workers: the same run as in process, and files that others can use."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import ScalingConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rayrm import RewardConfig, RewardModel, RewardTrainer
from rayrm.errors import ClusterError, ConfigError, DataError, RunDirectoryError
from rayrm.train.records import read_records
from tests.tiny import save_tiny, saved_weights, tiny_model, tiny_rankings, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# float32 sums over ranks and layouts in other orders.
TOLERANCE = 1e-4
NUM_STEPS = 8
TRAIN = tiny_rows(44, margin=True)
EVALUATION = {"near": tiny_rows(7, seed=8), "far": tiny_rows(5, seed=9)}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **changes,
    }


def run(directory: Path, model: Any, workers: int = 0, **changes: Any) -> RewardTrainer:
    """One finished run with evaluation sets by name."""
    own = {key: changes.pop(key) for key in ("peft_config", "optimizer_cls_and_kwargs") if key in changes}
    trainer = RewardTrainer(
        model,
        RewardConfig(str(directory), **settings(**changes)),
        train_dataset=TRAIN,
        eval_dataset=EVALUATION,
        processing_class=tiny_tokenizer(),
        scaling_config=ScalingConfig(num_workers=workers) if workers else None,
        **own,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base"), seed=1))


CHECKPOINTED = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "near_loss",
    "report_to": "tensorboard",
}


@pytest.fixture(scope="module")
def in_process(base: str, tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    return run(tmp_path_factory.mktemp("here") / "run", base, **CHECKPOINTED)


@dataclass(frozen=True)
class Fitted:
    trainer: RewardTrainer
    directory: Path


# Two workers without DeepSpeed: see test_resume.py.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids=["zero2", "zero3"])
def fitted(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """The same run on two Ray Train workers, with half the pairs on each."""
    directory = tmp_path_factory.mktemp("there") / "run"
    changes = {**CHECKPOINTED, "per_device_train_batch_size": 4, "zero_stage": request.param}
    # By a relative path: the workers' current directory is another.
    with contextlib.chdir(Path(base).parent):
        return Fitted(run(directory, Path(base).name, 2, **changes), directory)


def logged(trainer: RewardTrainer, key: str) -> np.ndarray:
    return np.array([record[key] for record in trainer.state.log_history if key in record])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return saved_weights(directory)


def test_two_workers_have_the_trajectory_of_one_process(fitted: Fitted, in_process: RewardTrainer) -> None:
    for key in ("loss", "eval_near_loss", "eval_far_mean_reward"):
        here, there = logged(in_process, key), logged(fitted.trainer, key)
        assert len(here) == len(there) > 1
        np.testing.assert_allclose(there, here, rtol=0, atol=TOLERANCE, err_msg=key)
    np.testing.assert_allclose(
        logged(fitted.trainer, "grad_norm"), logged(in_process, "grad_norm"), rtol=TOLERANCE
    )


def test_two_workers_end_with_the_weights_of_one_process(fitted: Fitted, in_process: RewardTrainer) -> None:
    here, there = weights(in_process.output_dir), weights(fitted.directory)
    assert here.keys() == there.keys()
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, rtol=0, atol=TOLERANCE)


def test_the_saved_directory_loads_in_stock_transformers_with_the_same_scores(fitted: Fitted) -> None:
    rows = EVALUATION["near"]
    predictions = fitted.trainer.predict(rows).predictions
    stock = AutoModelForSequenceClassification.from_pretrained(fitted.directory).eval()
    tokenizer = tiny_tokenizer()
    for row, (chosen, _) in zip(rows, predictions, strict=True):
        ids = tokenizer(row["prompt"] + row["chosen"] + "</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert float(stock(input_ids=ids).logits) == pytest.approx(chosen, abs=TOLERANCE)


def test_every_set_has_its_metrics_and_the_best_checkpoint_is_saved(fitted: Fitted) -> None:
    losses = logged(fitted.trainer, "eval_near_loss")
    best = f"checkpoint-{4 * (int(losses.argmin()) + 1)}"
    saved, kept = weights(fitted.directory), weights(fitted.directory / best)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    metrics = fitted.trainer.evaluate()
    assert metrics["eval_near_loss"] == pytest.approx(losses.min(), abs=TOLERANCE)
    assert {"eval_near_accuracy", "eval_far_accuracy"} <= metrics.keys()


def test_tensorboard_holds_what_metrics_jsonl_holds(fitted: Fitted) -> None:
    (events,) = fitted.directory.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    np.testing.assert_allclose(losses, logged(fitted.trainer, "loss"), rtol=1e-6)
    assert [event.step for event in board.Scalars("eval/near_loss")] == [4, 8]


def test_a_finished_run_is_not_trained_over(fitted: Fitted) -> None:
    before = (fitted.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"is finished.*choose another `output_dir`"):
        fitted.trainer.train()
    assert (fitted.directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("zero_stage", [None, 0, 1, 2, 3])
def test_a_model_object_is_trained_in_place_and_is_the_caller_s_again(
    tmp_path: Path, zero_stage: int | None
) -> None:
    model = tiny_model(seed=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = run(tmp_path / "run", model, zero_stage=zero_stage)
    assert trainer.model is model
    assert model.config._attn_implementation == "sdpa"
    saved = weights(tmp_path / "run")
    for name, weight in model.state_dict().items():
        assert not torch.equal(before[name], weight)
        assert torch.equal(saved[name], weight)
    # No hook of an engine is left: the model computes, and can be trained by another run in this process.
    assert trainer.evaluate()["eval_near_num_pairs"] == 7
    run(tmp_path / "again", model, zero_stage=zero_stage, max_steps=1)
    assert not torch.equal(saved["score.weight"], model.score.weight)


def test_the_best_model_need_not_be_the_last(base: str, tmp_path: Path) -> None:
    # The loss falls: where the greatest is called the best, that is an early checkpoint.
    changes = {**CHECKPOINTED, "greater_is_better": True, "eval_steps": 1, "save_steps": 1}
    trainer = run(tmp_path / "run", base, **changes, save_total_limit=2)
    losses = logged(trainer, "eval_near_loss")
    best = int(losses.argmax()) + 1
    assert best < NUM_STEPS
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{NUM_STEPS}"}
    assert losses.max() > losses[-1] + 10 * TOLERANCE
    assert trainer.evaluate()["eval_near_loss"] == pytest.approx(losses.max(), abs=TOLERANCE)


def test_a_best_metric_that_is_no_metric_is_refused_by_name(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`metric_for_best_model` \(loss\).*eval_near_loss"):
        run(tmp_path / "run", base, **{**CHECKPOINTED, "metric_for_best_model": "loss"})


@pytest.mark.parametrize("zero_stage", [None, 2])
def test_lora_trains_adapter_and_head_and_leaves_the_base_alone(
    base: str, tmp_path: Path, zero_stage: int | None
) -> None:
    from peft import AutoPeftModelForSequenceClassification, LoraConfig

    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    before = weights(Path(base))
    directory = tmp_path / "run"
    trainer = run(directory, base, peft_config=lora, zero_stage=zero_stage, learning_rate=2e-2)
    adapter = load_file(directory / "adapter_model.safetensors")
    head = next(weight for name, weight in adapter.items() if "score" in name and "lora" not in name)
    assert not torch.equal(head, before["score.weight"])
    after = trainer.model.get_base_model().state_dict()
    query = "model.layers.0.self_attn.q_proj"
    assert torch.equal(after[f"{query}.base_layer.weight"], before[f"{query}.weight"])
    assert float(after[f"{query}.lora_B.default.weight"].abs().max()) > 0
    rows = EVALUATION["near"]
    predictions = trainer.predict(rows).predictions[:, 0]
    ours = RewardModel.from_pretrained(directory)
    scores = ours.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    np.testing.assert_allclose(scores, predictions, rtol=0, atol=TOLERANCE)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    stock.config.pad_token_id = 0
    tokenizer = tiny_tokenizer()
    for row, score in zip(rows, predictions, strict=True):
        ids = tokenizer(row["prompt"] + row["chosen"] + "</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert float(stock(input_ids=ids).logits) == pytest.approx(score, abs=TOLERANCE)


def test_an_encoder_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
    )
    trainer = run(tmp_path / "run", BertForSequenceClassification(config), num_train_epochs=6, max_steps=-1)
    losses = logged(trainer, "loss")
    assert losses[-4:].mean() < losses[:4].mean() - 0.05
    assert trainer.evaluate()["eval_near_accuracy"] > 0.5


def test_refused_rows_are_kept_with_their_reasons(base: str, tmp_path: Path) -> None:
    rows: list[Any] = [*TRAIN, {"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "p"}]
    trainer = RewardTrainer(
        base,
        RewardConfig(str(tmp_path / "run"), max_bad_row_fraction=0.5, **settings(max_steps=1)),
        train_dataset=rows,
    )
    trainer.train()
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == set(trainer.train_set.report.refused)
    assert len(lines) == 2
    assert trainer.train_set.num_rows == len(TRAIN)


def test_an_optimizer_class_is_used_with_its_arguments(base: str, tmp_path: Path) -> None:
    spec = (torch.optim.SGD, {"lr": 0.0})
    run(tmp_path / "run", base, optimizer_cls_and_kwargs=spec)
    before, after = weights(Path(base)), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_the_default_precision_runs_everywhere_and_stays_near_fp32(base: str, tmp_path: Path) -> None:
    default = run(tmp_path / "default", base, bf16=None)
    assert default.args.bf16 is True
    exact = run(tmp_path / "fp32", base)
    # bf16 has 8 bits of mantissa; where it is not usable the two runs are equal.
    np.testing.assert_allclose(logged(default, "loss"), logged(exact, "loss"), rtol=0, atol=5e-2)


def test_records_are_read_from_the_run_directory(in_process: RewardTrainer) -> None:
    assert in_process.state.log_history == read_records(in_process.output_dir)
    assert in_process.state.global_step == NUM_STEPS


def test_what_the_cluster_cannot_give_is_refused_before_training(base: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="64 workers of 1 CPU need 64 CPU"):
        RewardTrainer(
            base,
            RewardConfig(str(tmp_path / "run"), **settings()),
            train_dataset=TRAIN,
            scaling_config=ScalingConfig(num_workers=64),
        )


def test_a_run_without_data_is_refused(base: str) -> None:
    with pytest.raises(DataError, match="`train_dataset` is required"):
        RewardTrainer(base)


def test_a_run_in_this_process_leaves_no_launcher_s_variables(base: str, tmp_path: Path) -> None:
    before = dict(os.environ)
    run(tmp_path / "run", base, zero_stage=1, max_steps=1)
    left = {name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ}
    assert left <= set(before)
    assert (
        subprocess.run(
            [sys.executable, "-c", "from accelerate import PartialState; PartialState()"], capture_output=True
        ).returncode
        == 0
    )


def test_predictions_stand_in_the_rows_own_order_and_end_in_nan(in_process: RewardTrainer) -> None:
    rows = [*tiny_rankings(3, seed=4), *tiny_rows(2, seed=4)]
    outcome = in_process.predict(rows)
    completions = [row.get("completions") or [row["chosen"], row["rejected"]] for row in rows]
    longest = max(map(len, completions))
    assert outcome.predictions.shape == (5, longest)
    model = RewardModel.from_pretrained(in_process.output_dir)
    for row, texts, scores in zip(rows, completions, outcome.predictions, strict=True):
        alone = model.score([row["prompt"]] * len(texts), texts)
        assert scores[: len(texts)].tolist() == pytest.approx(alone, abs=1e-5)
        assert np.isnan(scores[len(texts) :]).all()
    assert outcome.metrics["test_num_rows"] == 5
