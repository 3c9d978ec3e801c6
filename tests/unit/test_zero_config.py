"""A user's DeepSpeed file is honoured, or refused with both settings named; nothing of it is overwritten."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train.zero_config import deepspeed_config, zero_stage_of

# What transformers' documentation has people write.
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7, "reduce_bucket_size": "auto"},
    "wall_clock_breakdown": False,
}


def config_of(deepspeed: Any, **settings: Any) -> RewardConfig:
    return RewardConfig(**{"bf16": False, "deepspeed": deepspeed, **settings})


def test_auto_and_absent_settings_follow_the_run_and_the_others_stay() -> None:
    told = deepspeed_config(config_of(AUTO, max_grad_norm=0.5), "fp32", 2)
    assert told["gradient_clipping"] == 0.5
    assert told["zero_optimization"]["stage"] == 3
    assert told["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert "reduce_bucket_size" not in told["zero_optimization"]
    assert told["wall_clock_breakdown"] is False


def test_equal_settings_are_no_contradiction() -> None:
    said = {
        "train_batch_size": 4 * 3 * 2,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
    }
    run = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5}
    assert deepspeed_config(config_of(said, **run), "fp32", 2)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"gradient_clipping": 0.25}, ["`gradient_clipping` (0.25)", "`max_grad_norm` (1.0)"]),
        (
            {"gradient_accumulation_steps": 4},
            ["`gradient_accumulation_steps` (4)", "`gradient_accumulation_steps` (1)"],
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            ["`train_micro_batch_size_per_gpu` (2)", "`per_device_train_batch_size` (8)"],
        ),
        ({"train_batch_size": 8}, ["`train_batch_size` (8)", "x workers` (16)"]),
        ({"bf16": {"enabled": True}}, ["`bf16.enabled` (True)", "`bf16` (False)"]),
        ({"fp16": {"enabled": True}}, ["`fp16.enabled` (True)", "`fp16` (False)"]),
        ({"fp16": {"enabled": False, "loss_scale": 8}}, ["`fp16.loss_scale`", "Delete it"]),
        ({"optimizer": {"type": "Adam"}}, ["section `optimizer`", "`optim`"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["section `scheduler`", "`lr_scheduler_type`"]),
        ({"torch_autocast": {"enabled": True}}, ["section `torch_autocast`", "`bf16`"]),
    ],
)
def test_what_contradicts_the_run_is_refused_with_both_named(
    tmp_path: Path, said: dict[str, Any], named: list[str]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(said))
    for deepspeed in (said, str(file)):
        with pytest.raises(ConfigError) as refused:
            deepspeed_config(config_of(deepspeed), "fp32", 2)
        assert [part for part in named if part not in str(refused.value)] == []


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        deepspeed_config(config_of({"gradient_clipping": 3.0, "optimizer": {}}), "fp32", 1)
    assert len(str(refused.value).splitlines()) == 2


def test_overlapped_communication_is_turned_off_and_said(caplog: pytest.LogCaptureFixture) -> None:
    said = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        told = deepspeed_config(config_of(said), "fp32", 2)
    assert told["zero_optimization"]["overlap_comm"] is False
    assert "`zero_optimization.overlap_comm` (true) is set to false" in caplog.text


def test_the_stage_is_what_either_setting_says() -> None:
    assert zero_stage_of(RewardConfig(bf16=False)) is None
    assert zero_stage_of(RewardConfig(bf16=False, zero_stage=2)) == 2
    assert zero_stage_of(config_of(AUTO)) == 3
    assert zero_stage_of(config_of({})) == 0


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"ds.json\) is not valid JSON"):
        deepspeed_config(config_of(str(file)), "fp32", 1)
