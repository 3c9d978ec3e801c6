"""Adapters through the trainer: few bits, tokens that a template brings, the whole model saved at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.torch import load_file

from rayrm import RewardConfig, RewardModel, RewardTrainer
from rayrm.config import DataConfig, LoraConfig, ModelConfig, QuantizationConfig
from rayrm.errors import RunDirectoryError
from rayrm.runfile import Run
from rayrm.train.launch import train_run
from tests.tiny import save_tiny, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
ROWS = tiny_rows(16, seed=3)
FEW: dict[str, Any] = {"max_steps": 2, "bf16": False, "use_cpu": True, "learning_rate": 1e-2}


def scores_of(directory: Path) -> list[float]:
    model = RewardModel.from_pretrained(directory)
    return model.score([row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS])


def test_a_run_file_trains_an_adapter_on_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    lora, four = LoraConfig(r=4, use_rslora=True), QuantizationConfig(load_in_4bit=True)
    run = Run(
        ModelConfig(str(base), lora=lora, quantization=four),
        DataConfig(train=str(rows_file(tmp_path))),
        RewardConfig(str(tmp_path / "run"), **FEW),
    )
    assert train_run(run).num_steps == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert np.std(scores_of(tmp_path / "run")) > 0
    whole = Run(ModelConfig(str(base), lora=lora), run.data, run.reward)
    with pytest.raises(RunDirectoryError):
        train_run(whole)


def rows_file(directory: Path) -> Path:
    import json

    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_tokens_of_a_template_are_trained_and_the_whole_model_saved(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    other = tiny_tokenizer()
    other.add_tokens(["<turn>"])
    other.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    rows = [
        {
            name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        for row in ROWS
    ]
    trainer = RewardTrainer(
        str(base),
        RewardConfig(
            str(tmp_path / "run"), chat_template_path=str(tmp_path / "other"), merge_on_save=True, **FEW
        ),
        train_dataset=rows,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    adapter = trainer.model.peft_config["default"]
    assert adapter.trainable_token_indices == {"embed_tokens": [400]}
    trainer.train()
    found = trainer.predict(rows).predictions[:, 0]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape[0] == 401
    model = RewardModel.from_pretrained(tmp_path / "run")
    assert model.score(
        [row["chosen"][:1] for row in rows], [row["chosen"][1:] for row in rows]
    ) == pytest.approx(found, abs=1e-4)
    trainer.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.allclose(again[name], weight, atol=1e-6) for name, weight in saved.items())
