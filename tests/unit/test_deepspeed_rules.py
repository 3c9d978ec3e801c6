"""A user's own DeepSpeed configuration is heeded, or refused, or told what of it is not: never dropped."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import ConfigError
from rayrm.train.zero import deepspeed_config


def refusal(deepspeed: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RewardConfig(deepspeed=deepspeed, **settings)
    return str(caught.value)


SAME = [
    ({"gradient_clipping": 0.25}, "max_grad_norm", 0.25, "1.0"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 4, "1"),
    ({"train_micro_batch_size_per_gpu": 2}, "per_device_train_batch_size", 2, "8"),
    ({"fp16": {"enabled": True}}, "fp16", True, "False"),
    ({"bf16": {"enabled": False}}, "bf16", False, "True"),
    ({"bfloat16": {"enabled": False}}, "bf16", False, "True"),
]


@pytest.mark.parametrize(("table", "field", "said", "ours"), SAME, ids=lambda case: str(case))
def test_what_contradicts_a_field_is_refused_with_both_and_the_fix(
    table: dict[str, Any], field: str, said: Any, ours: str
) -> None:
    key = next(iter(table))
    message = refusal(table)
    assert f"`deepspeed.{key}" in message
    assert f"({said}) and `{field}` ({ours}) are one setting" in message
    fix = f"{field}={str(said).lower()}"
    assert f"`{fix}`" in message
    RewardConfig(deepspeed=table, **{field: said})  # the fix that is named


@pytest.mark.parametrize(("table", "field", "said", "ours"), SAME, ids=lambda case: str(case))
def test_auto_takes_the_field(table: dict[str, Any], field: str, said: Any, ours: str) -> None:
    auto: dict[str, Any] = {
        key: {"enabled": "auto"} if isinstance(value, dict) else "auto" for key, value in table.items()
    }
    assert getattr(RewardConfig(deepspeed=auto, **{field: said}), field) == said
    assert getattr(RewardConfig(deepspeed=auto), field) == getattr(RewardConfig(), field)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation` (True)"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer` (False)"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled` (True)"),
        ({"amp": {"enabled": True}}, "amp.enabled` (True)"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype` (bf16)"),
    ],
    ids=str,
)
def test_what_the_engine_must_have_otherwise_is_refused(table: dict[str, Any], key: str) -> None:
    assert f"`deepspeed.{key} can only be" in refusal(table)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_sections_that_the_config_sets_are_refused(section: str) -> None:
    assert f"section `{section}`" in refusal({section: {"type": "AdamW"}})


def test_all_contradictions_are_told_at_once() -> None:
    said = refusal({"gradient_clipping": 0.25, "gradient_accumulation_steps": 4, "fp16": {"enabled": True}})
    assert said.count("are one setting") == 3


@pytest.mark.parametrize("stage", [5, "two"])
def test_a_stage_that_there_is_not_is_refused(stage: Any) -> None:
    assert f"stage` ({stage!r}) must be 0, 1, 2 or 3" in refusal({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("text", ["{oops", "[1]"])
def test_a_file_that_holds_no_table_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    assert str(file) in refusal(str(file))


def test_a_batch_size_must_be_the_rows_of_a_step() -> None:
    assert "must be a multiple of 24" in refusal({"train_batch_size": 20}, gradient_accumulation_steps=3)
    config = RewardConfig(deepspeed={"train_batch_size": 48}, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"`deepspeed.train_batch_size` \(48\) is not 72.* x workers \(3\)"):
        deepspeed_config(config, "fp32", 3)
    assert "train_batch_size" not in deepspeed_config(config, "fp32", 2)


def test_settings_that_cannot_be_heeded_are_told(caplog: pytest.LogCaptureFixture) -> None:
    table = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "fp16": {"enabled": True, "loss_scale": 128, "initial_scale_power": "auto"},
    }
    config = RewardConfig(deepspeed=table, fp16=True)
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        made = deepspeed_config(config, "fp16", 1)
    assert made["zero_optimization"]["overlap_comm"] is False
    assert "`deepspeed.zero_optimization.overlap_comm` (true) is off" in caplog.text
    assert "`deepspeed.fp16` (loss_scale) is not used" in caplog.text


def test_what_only_deepspeed_knows_passes_and_what_it_is_told_too_is_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 1,
        "fp16": {"enabled": False, "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
        "steps_per_print": 7,
    }
    before = copy.deepcopy(table)
    made = deepspeed_config(RewardConfig(deepspeed=table, max_grad_norm=0.5), "bf16", 2)
    assert table == before
    assert made["zero_optimization"] == table["zero_optimization"]
    assert made["wall_clock_breakdown"] is True
    assert made["steps_per_print"] == 7
    assert made["gradient_clipping"] == 0.5
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not {"fp16", "bf16", "train_batch_size"} & set(made)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({}, None),
        ({"zero_stage": 0}, 0),
        ({"zero_stage": 3}, 3),
        ({"deepspeed": {}}, 0),
        ({"deepspeed": {"zero_optimization": {"stage": "auto"}}}, 0),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 3),
    ],
    ids=str,
)
def test_the_stage_is_one_however_it_is_said(settings: dict[str, Any], stage: int | None) -> None:
    assert resolved_stage(RewardConfig(**settings)) == stage


def test_the_stage_of_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert resolved_stage(RewardConfig(deepspeed=str(file))) == 2
