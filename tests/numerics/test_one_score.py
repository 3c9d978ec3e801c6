"""Law 2: a (prompt, completion) has one score: in the trainer, in `RewardModel`, and in stock transformers.

Stock transformers scores one text at a time, from the saved directory and the saved tokenizer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from rayrm import RewardConfig, RewardModel, RewardTrainer
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray

# Packed, padded and single-text attention add the same numbers in other orders.
TOLERANCE = 1e-4


def tiny_bert() -> PreTrainedModel:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        num_labels=1,
    )
    return BertForSequenceClassification(config)


@dataclass(frozen=True)
class Trained:
    """A trained and saved model, and its trainer's scores `[P, 2]` of `rows`."""

    trainer: RewardTrainer
    directory: Path
    rows: list[dict[str, Any]]
    conversational: bool
    predictions: np.ndarray


def evaluation_rows(conversational: bool) -> list[dict[str, Any]]:
    """Rows of many lengths; the pad token stands inside and at the end of texts."""
    rows = tiny_rows(24, seed=9, conversational=conversational)
    for row, text in zip(rows, [" a <pad> cat", " <pad>", " the dog <pad><pad>"], strict=False):
        row["chosen"] = [{"role": "assistant", "content": text}] if conversational else text
    return rows


@pytest.fixture(scope="module", params=["standard", "conversational", "encoder"])
def trained(
    request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    conversational = request.param == "conversational"
    encoder = request.param == "encoder"
    directory = tmp_path_factory.mktemp(request.param) / "run"
    rows = evaluation_rows(conversational)
    trainer = RewardTrainer(
        tiny_bert() if encoder else tiny_model(seed=1),
        RewardConfig(
            str(directory),
            max_steps=6,
            learning_rate=5e-3,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=6,
        ),
        train_dataset=tiny_rows(48, conversational=conversational),
        eval_dataset=rows,
        processing_class=tiny_tokenizer(bos=not encoder, chat=conversational),
    )
    trainer.train()
    predictions = trainer.predict(rows).predictions
    return Trained(trainer, directory, rows, conversational, np.asarray(predictions))


def stock_scores(trained: Trained, side: str) -> np.ndarray:
    """One text at a time, as a user of transformers would write it."""
    model = AutoModelForSequenceClassification.from_pretrained(trained.directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.directory)
    scores = []
    for row in trained.rows:
        if trained.conversational:
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            batch = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token, return_tensors="pt")
        # No mask: transformers pools by the pad id, and a pad token inside a text is a token like others.
        with torch.no_grad():
            scores.append(float(model(input_ids=batch["input_ids"]).logits[0, 0]))
    return np.array(scores)


@pytest.mark.parametrize(("side", "place"), [("chosen", 0), ("rejected", 1)])
def test_trainer_and_reward_model_and_transformers_give_one_score(
    trained: Trained, side: str, place: int
) -> None:
    stock = stock_scores(trained, side)
    assert np.ptp(stock) > 100 * TOLERANCE
    np.testing.assert_allclose(trained.predictions[:, place], stock, rtol=0, atol=TOLERANCE)
    prompts = [row["prompt"] for row in trained.rows]
    scores = RewardModel.from_pretrained(trained.directory).score(prompts, [r[side] for r in trained.rows])
    np.testing.assert_allclose(scores, stock, rtol=0, atol=TOLERANCE)


def test_the_metrics_of_training_s_evaluation_are_of_these_scores(trained: Trained) -> None:
    record = next(record for record in trained.trainer.state.log_history if "eval_loss" in record)
    chosen, rejected = trained.predictions.T
    assert record["eval_mean_reward"] == pytest.approx(trained.predictions.mean(), abs=TOLERANCE)
    assert record["eval_max_reward"] == pytest.approx(trained.predictions.max(), abs=TOLERANCE)
    assert record["eval_accuracy"] == (chosen > rejected).mean()
    assert record["eval_loss"] == pytest.approx(np.logaddexp(0, rejected - chosen).mean(), abs=TOLERANCE)


def test_a_score_does_not_depend_on_its_batch(trained: Trained) -> None:
    prompts = [row["prompt"] for row in trained.rows]
    answers = [row["chosen"] for row in trained.rows]
    together = RewardModel.from_pretrained(trained.directory).score(prompts, answers)
    small = RewardModel.from_pretrained(trained.directory, max_tokens_per_batch=64)
    np.testing.assert_allclose(small.score(prompts, answers), together, rtol=0, atol=TOLERANCE)
    backwards = small.score(prompts[::-1], answers[::-1])
    np.testing.assert_allclose(backwards[::-1], together, rtol=0, atol=TOLERANCE)
    # The last text again, behind left neighbours that begin as it does.
    crowd = [prompts[-1]] * 3
    scores = small.score(crowd, [answers[0], answers[1], answers[-1]])
    assert scores[-1] == pytest.approx(together[-1], abs=TOLERANCE)


def test_the_saved_head_has_no_activation(trained: Trained) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained.directory)
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1
