"""A misspelt key of a DeepSpeed file is refused by its name; the names are the installed DeepSpeed's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrm.config import RewardConfig
from rayrm.deepspeed_keys import KEYS
from rayrm.deepspeed_rules import without_effect
from rayrm.errors import ConfigError
from rayrm.train.zero_config import deepspeed_config

PYDANTIC = {
    ("zero_optimization",): "runtime.zero.config.DeepSpeedZeroConfig",
    ("zero_optimization", "offload_param"): "runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    ("zero_optimization", "offload_optimizer"): (
        "runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig"
    ),
    ("zero_optimization", "leaf_module"): "runtime.zero.leaf_module_config.DeepSpeedZeroLeafModuleConfig",
    ("fp16",): "runtime.precision_config.DeepSpeedFP16Config",
    ("bf16",): "runtime.precision_config.DeepSpeedBF16Config",
}
# Of other versions, or Apex's: said elsewhere, or harmless.
OURS = {"cpu_offload_params", "opt_level"}


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        RewardConfig(deepspeed=table)
    return str(raised.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"zero_optimisation": {"stage": 2}}, "`deepspeed.zero_optimisation` is no setting"),
        ({"zero_optimisation": {"stage": 2}}, "Did you mean `zero_optimization`?"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 0}},
            "`deepspeed.zero_optimization.stage3_max_live_parameter` is no setting of DeepSpeed's. Did you "
            "mean `stage3_max_live_parameters`? Correct or delete it.",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "`deepspeed.zero_optimization.offload_optimizer.devise` is no setting of DeepSpeed's. Did you "
            "mean `device`?",
        ),
        ({"fp16": {"loss_scales": 1}}, "`deepspeed.fp16.loss_scales` is no setting"),
        ({"aio": {"block_sise": 1}}, "`deepspeed.aio.block_sise` is no setting"),
        ({"optimizer": {"kind": "AdamW"}}, "`deepspeed.optimizer.kind` is no setting"),
        ({"sparse_attention": {}}, "`deepspeed.sparse_attention` is no setting"),
        ({"pipeline": {"stages": 2}}, "`deepspeed.pipeline`: a run here uses nothing of it"),
        ({"zero_optimization": True}, "`deepspeed.zero_optimization` (True) must be a table"),
        ({"fp16": True, "bf16": "on"}, "`deepspeed.bf16` ('on') must be a table"),
    ],
    ids=str,
)
def test_what_deepspeed_would_read_past_is_refused_by_name(table: dict[str, Any], said: str) -> None:
    assert said in refusal(table)


def test_a_misspelt_key_is_told_beside_what_else_is_wrong() -> None:
    said = refusal({"gradient_cliping": 1.0, "gradient_accumulation_steps": 4})
    assert "`deepspeed.gradient_cliping` is no setting" in said
    assert "`gradient_accumulation_steps=4`" in said


@pytest.mark.parametrize("path", PYDANTIC, ids=".".join)
def test_the_keys_of_a_section_are_those_of_the_installed_deepspeed(path: tuple[str, ...]) -> None:
    module, _, name = PYDANTIC[path].rpartition(".")
    made = getattr(pytest.importorskip(f"deepspeed.{module}"), name)
    theirs = {word for key, field in made.model_fields.items() for word in (key, field.alias) if word}
    assert KEYS[path] - OURS == theirs


def test_every_other_key_is_a_word_of_the_installed_deepspeed() -> None:
    root = Path(pytest.importorskip("deepspeed").__file__).parent
    places = [
        *(root / "runtime").rglob("*.py"),
        *(root / "monitor").glob("*.py"),
        *root.glob("*/c*.py"),
        root / "__init__.py",
    ]
    text = "\n".join(file.read_text(encoding="utf-8") for file in places)
    others = set().union(*(keys for path, keys in KEYS.items() if path not in PYDANTIC)) - OURS
    assert sorted(key for key in others if f'"{key}"' not in text and f"'{key}'" not in text) == []


def test_what_a_section_has_and_a_run_cannot_heed_is_told() -> None:
    table = {
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "activation_checkpointing": {"cpu_checkpointing": True},
        "communication_data_type": "bf16",
    }
    config = RewardConfig(deepspeed=table, bf16=True)
    told = without_effect(table, config, autocast=True)
    for said in (
        "bf16` (immediate_grad_update)",
        "activation_checkpointing`",
        "communication_data_type` (bf16)",
    ):
        assert any(said in line for line in told), said
    assert len(told) == 3
    assert len(without_effect(table, config, autocast=False)) == 2


def test_a_section_that_is_null_is_absent() -> None:
    table = {"zero_optimization": {"stage": 2, "offload_optimizer": None}, "fp16": None, "scheduler": None}
    made = deepspeed_config(RewardConfig(deepspeed=table), "fp32", 1)
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert deepspeed_config(RewardConfig(deepspeed={"zero_optimization": None}), "fp32", 1)


def test_quantized_weights_are_not_for_autocast() -> None:
    table = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    assert "Type `bf16=false`" in refusal(table)
    assert RewardConfig(deepspeed=table, bf16=False).bf16 is False
