"""The model a run trains is set up as the settings say, and what they do not get is told."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train.build import ModelSource, build_model
from rayrm.train.positions import check_rope
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Stopped, StoppingSet, Variant, job_of, tokenized
from tests.tiny import tiny_model, tiny_tokenizer

ZERO3 = {"zero_optimization": {"stage": 3}}


def adapter(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=dropout, target_modules="all-linear")


def config_of(**settings: Any) -> RewardConfig:
    return RewardConfig(**{"bf16": False, "gradient_checkpointing": False, **settings})


def test_an_adapters_dropout_that_is_turned_off_is_told_with_what_to_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def active(config: RewardConfig, dropout: float) -> bool:
        model = build_model(ModelSource(tiny_model(), adapter(dropout)), config, tiny_tokenizer())
        return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())

    with caplog.at_level(logging.WARNING, "rayrm.train"):
        assert active(config_of(disable_dropout=False), 0.1)
        assert not active(config_of(), 0.0)
    assert "dropout" not in caplog.text
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        assert not active(config_of(), 0.1)
    assert "adapter's dropout (0.1)" in caplog.text
    assert "`disable_dropout=false`" in caplog.text


@pytest.mark.parametrize(
    ("settings", "reentrant"),
    [
        ({}, False),
        ({"zero_stage": 2}, False),
        ({"zero_stage": 3}, True),
        ({"deepspeed": ZERO3}, True),
        ({"deepspeed": ZERO3, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, True),
    ],
)
def test_an_adapter_is_recomputed_reentrantly_under_zero_3_unless_the_settings_say(
    settings: dict[str, Any], reentrant: bool
) -> None:
    config = config_of(gradient_checkpointing=True, **settings)
    model = build_model(ModelSource(tiny_model(), adapter()), config, tiny_tokenizer())
    layer = model.get_base_model().model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def test_a_run_that_fails_gives_the_model_back_as_it_was(tmp_path: Path) -> None:
    variant = Variant("failing", {"max_steps": 5, "per_device_train_batch_size": 4})
    job = job_of(variant, tmp_path, tokenized(20))
    model: Any = job.source.model
    forwards = {name: "forward" in vars(part) for name, part in model.named_modules()}
    stopping = StoppingSet(job.train_set, 3)
    with pytest.raises(Stopped) as stopped:
        train_rank(replace(job, train_set=stopping), lambda record: None)
    assert stopped.value.__traceback__ is not None  # what the run held is still referred to
    assert not model.get_input_embeddings().sparse
    assert model.config._attn_implementation == "sdpa"
    assert {name: "forward" in vars(part) for name, part in model.named_modules()} == forwards
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    torch.optim.AdamW(model.parameters()).step()


def test_an_evaluation_batch_size_is_told_to_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(directory: str, **settings: Any) -> str:
        caplog.clear()
        variant = Variant(directory, {"max_steps": 1, "eval_strategy": "steps", **settings})
        job = job_of(variant, tmp_path / directory, tokenized(8))
        with caplog.at_level(logging.INFO, "rayrm.train"):
            train_rank(replace(job, eval_sets={"": job.train_set}), lambda record: None)
        return caplog.text

    assert "per_device_eval_batch_size" not in told("default")
    assert "`per_device_eval_batch_size` (2) changes nothing" in told("set", per_device_eval_batch_size=2)


@pytest.mark.parametrize("stage", [{"zero_stage": 3}, {"deepspeed": ZERO3}])
def test_rows_that_take_forwards_of_their_own_are_refused_at_the_start_of_zero_3(
    stage: dict[str, Any],
) -> None:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model.config.max_position_embeddings = 64
    with pytest.raises(ConfigError, match=r"rows above 64 tokens .* the longest has 65.* `max_length=64`"):
        check_rope(model, 65, config_of(**stage), 2)
    check_rope(model, 64, config_of(**stage), 2)
    check_rope(model, 65, config_of(**stage), 1)
    check_rope(model, 65, config_of(zero_stage=2), 2)
