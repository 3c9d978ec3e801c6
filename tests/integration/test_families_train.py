"""Each family trains from a saved base model, whole and with LoRA, and stock libraries give its scores.

In this process, on rows tokenized here: no cluster is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayrm import RewardConfig, RewardModel, RewardTrainer
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.data.tokenized_set import TokenizedSet
from tests.families import ENCODERS, FAMILIES, save_base
from tests.tiny import tiny_rows, tiny_tokenizer

ROWS = tiny_rows(24)
NEVER_MOVES = {
    # A difference of two scores does not depend on what is added to both.
    "gpt_neox": ["gpt_neox.final_layer_norm.bias"],
    "opt": ["model.decoder.final_layer_norm.bias"],
    "roberta": ["classifier.out_proj.bias"],
    "bert": ["classifier.bias"],
    "deberta_v2": ["classifier.bias"],
    "modernbert": ["classifier.bias"],
}
HEADS = {
    "bert": ["classifier", "pooler"],
    "roberta": ["classifier"],
    "deberta_v2": ["pooler", "classifier"],
    "modernbert": ["head", "classifier"],
}


@pytest.fixture(scope="module")
def rows() -> TokenizedSet:
    found = tokenize_rows(tiny_tokenizer(bos=True, chat=False), [parse_row(row) for row in ROWS], 512)
    return TokenizedSet.from_rows([row for row in found if isinstance(row, TokenizedRow)])


def trained(base: Path, rows: TokenizedSet, **options: Any) -> tuple[RewardTrainer, list[str], np.ndarray]:
    """After two epochs that lowered the loss: the trainer, which weights stayed, and the scores before."""
    settings: dict[str, Any] = {"bf16": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    args = RewardConfig(
        str(base.parent / "run"),
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        **settings,
    )
    trainer = RewardTrainer(str(base), args, train_dataset=rows, **options)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    first = trainer.predict(rows)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < first.metrics["test_loss"] - 0.02
    stayed = [name for name, w in trainer.model.named_parameters() if torch.equal(w, before[name])]
    return trainer, stayed, first.predictions


@torch.no_grad()
def stock_scores(model: torch.nn.Module, rows: TokenizedSet) -> np.ndarray:
    """`[R, 2]`: the chosen and the rejected side of every row, in one padded batch."""
    ids = [torch.as_tensor(side).long() for row in rows.fetch(range(rows.num_rows)) for side in row.sequences]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]).long()
    return model.eval()(input_ids=padded, attention_mask=mask).logits.view(-1, 2).numpy()


def assert_same(found: np.ndarray, trainer: RewardTrainer, rows: TokenizedSet, before: np.ndarray) -> None:
    """They are the trainer's scores, and neither all alike nor those of before training."""
    expected = trainer.predict(rows).predictions
    assert expected.std() > 0.05
    assert np.abs(expected - before).mean() > 0.05
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-5
    )  # the same float32 sums, padded otherwise


def our_scores(directory: Path) -> np.ndarray:
    model = RewardModel.from_pretrained(directory)
    sides = [
        model.score([row["prompt"] for row in ROWS], [row[side] for row in ROWS])
        for side in ("chosen", "rejected")
    ]
    return np.array(sides).T


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_becomes_a_reward_model_of_stock_transformers(
    family: str, rows: TokenizedSet, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base", saved_as="language_model")
    trainer, stayed, before = trained(base, rows)
    assert stayed == NEVER_MOVES.get(family, [])
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert stock.config.architectures == [type(trainer.model).__name__]
    assert_same(stock_scores(stock, rows), trainer, rows, before)
    assert_same(our_scores(tmp_path / "run"), trainer, rows, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_a_base_model_is_one_of_stock_peft(
    family: str, rows: TokenizedSet, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base", saved_as="body")
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    trainer, stayed, before = trained(base, rows, peft_config=lora)
    learns = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    for part in HEADS.get(family, ["score"]):
        assert any(f"{part}.modules_to_save.default" in name for name in learns), part
    still = [name for name in learns if name in stayed]
    assert all(name.endswith(("classifier.modules_to_save.default.bias", "out_proj.bias")) for name in still)
    assert len(still) == (family in ENCODERS)
    stock = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    stock.config.pad_token_id = trainer.processing_class.pad_token_id
    assert_same(stock_scores(stock, rows), trainer, rows, before)
    assert_same(our_scores(tmp_path / "run"), trainer, rows, before)
