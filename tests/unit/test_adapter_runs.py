"""Adapters through the trainer, in this process: few bits, tokens of a template, merging, going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.torch import load_file

from rayrm import RewardConfig, RewardTrainer
from rayrm.config import QuantizationConfig
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import RunDirectoryError
from tests.numerics.ranks import tokenized
from tests.tiny import save_tiny, tiny_tokenizer


def trainer(model: Path, output_dir: Path, *, adapted: bool = True, **given: Any) -> RewardTrainer:
    quantization = given.pop("quantization_config", None)
    settings = {"max_steps": 2, "bf16": False, "use_cpu": True, "learning_rate": 1e-2, **given}
    return RewardTrainer(
        str(model),
        RewardConfig(str(output_dir), **settings),
        train_dataset=TokenizedSet.from_rows(tokenized(16)),
        quantization_config=quantization,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if adapted else None,
    )


def test_an_adapter_on_four_bits_is_a_run_of_its_own_and_a_model_to_go_on_with(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    four = QuantizationConfig(load_in_4bit=True)
    trainer(base, tmp_path / "run", quantization_config=four).train()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    with pytest.raises(RunDirectoryError, match="differ in quantization"):
        trainer(base, tmp_path / "run").train()
    trainer(tmp_path / "run", tmp_path / "more", adapted=False).train()
    before, after = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("run", "more"))
    assert before.keys() == after.keys()
    assert any(not np.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_tokens_of_a_template_are_trained_and_the_whole_model_is_saved(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    other = tiny_tokenizer()
    other.add_tokens(["<turn>"])
    other.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    ours = trainer(base, tmp_path / "run", chat_template_path=str(tmp_path / "other"), merge_on_save=True)
    assert ours.model.peft_config["default"].trainable_token_indices == {"embed_tokens": [400]}
    ours.train()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape[0] == 401
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").exists()
    ours.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.allclose(again[name], weight, atol=1e-6) for name, weight in saved.items())
