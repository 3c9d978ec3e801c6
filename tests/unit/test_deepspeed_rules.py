"""A user's own DeepSpeed configuration is heeded, or refused, or told what of it is not: never dropped."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import check_one_optimizer, resolved_stage
from rayrm.errors import ConfigError
from rayrm.train.trainer import RewardTrainer
from rayrm.train.zero_config import deepspeed_config, with_sizes
from tests.tiny import tiny_model, tiny_tokenizer


def refusal(deepspeed: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RewardConfig(deepspeed=deepspeed, **settings)
    return str(caught.value)


SAME = [
    ({"gradient_clipping": 0.25}, "max_grad_norm", 0.25, "1.0"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 4, "1"),
    ({"train_micro_batch_size_per_gpu": 2}, "per_device_train_batch_size", 2, "8"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size", 2, "1"),
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
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype` (bf16)"),
        # It would make gradients as many times as large as there are workers.
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op` (sum)"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm` (False)",
        ),
    ],
    ids=str,
)
def test_what_the_engine_must_have_otherwise_is_refused(table: dict[str, Any], key: str) -> None:
    assert f"`deepspeed.{key} can only be" in refusal(table)


# As in transformers' documentation of DeepSpeed: all that its trainer fills in is "auto".
USUAL: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_usual_file_full_of_auto_passes_and_its_optimizer_and_schedule_are_ours(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(USUAL))
    made = deepspeed_config(RewardConfig(deepspeed=str(file), gradient_accumulation_steps=4), "fp32", 2)
    assert not {"optimizer", "scheduler", "fp16", "bf16", "train_batch_size"} & set(made)
    # DeepSpeed else refuses torch's optimizer.
    assert made["zero_force_ds_cpu_optimizer"] is False
    zero = made["zero_optimization"]
    assert zero["offload_optimizer"] == USUAL["zero_optimization"]["offload_optimizer"]
    assert "reduce_bucket_size" not in zero
    assert zero["stage3_max_live_parameters"] == 1e9


def test_numbers_in_the_sections_that_are_the_config_s_pass() -> None:
    optimizer = {
        "type": "Adam",
        "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True},
    }
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 2e-5}}
    RewardConfig(
        deepspeed={"optimizer": optimizer, "scheduler": scheduler},
        learning_rate=2e-5,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
    )


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            {"type": "Lamb"},
            "`deepspeed.optimizer.type` (Lamb) and `optim` (adamw_torch_fused) are one setting",
        ),
        (
            {"params": {"lr": 5e-5}},
            "optimizer.params.lr` (5e-05) and `learning_rate` (0.0001) are one setting",
        ),
        ({"params": {"lr": 5e-5}}, "Type `learning_rate=5e-05`"),
        ({"params": {"betas": [0.8, 0.99]}}, "Type `adam_beta1=0.8 adam_beta2=0.99`"),
        ({"params": {"betas": 0.8}}, "and `adam_beta1`, `adam_beta2` ([0.9, 0.999]) are one setting"),
        ({"params": {"eps": 1e-6}}, "Type `adam_epsilon=1e-06`"),
        ({"params": {"weight_decay": 0.1}}, "Type `weight_decay=0.1`"),
        ({"params": {"adam_w_mode": False}}, "optimizer.params.adam_w_mode` (False) can only be true"),
        ({"params": {"momentum": 0.9}}, "optimizer.params.momentum` (0.9) is no setting of AdamW"),
    ],
    ids=str,
)
def test_an_optimizer_section_that_contradicts_is_refused_with_both(
    optimizer: dict[str, Any], said: str
) -> None:
    assert said in refusal({"optimizer": optimizer})


def test_an_adam_section_contradicts_another_optimizer() -> None:
    assert "`deepspeed.optimizer.type` (AdamW) and `optim` (sgd)" in refusal(
        {"optimizer": {"type": "AdamW"}}, optim="sgd"
    )


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (
            {"type": "WarmupLR"},
            "`lr_scheduler_type` (linear) are one setting. Type `lr_scheduler_type=constant",
        ),
        ({"type": "OneCycle"}, "`deepspeed.scheduler.type` (OneCycle) and `lr_scheduler_type` (linear)"),
        ({"params": {"warmup_num_steps": 5}}, "Type `warmup_steps=5`"),
        ({"params": {"total_num_steps": 50}}, "Type `max_steps=50`"),
        ({"params": {"warmup_max_lr": 1.0}}, "Type `learning_rate=1.0`"),
        ({"params": {"warmup_min_lr": 1e-6}}, "warmup_min_lr` (1e-06) can only be 0"),
        ({"params": {"warmup_type": "log"}}, "warmup_type` (log) can only be linear"),
        ({"params": {"cycle": 1}}, "cycle` (1) is no setting of this schedule"),
    ],
    ids=str,
)
def test_a_scheduler_section_that_contradicts_is_refused_with_both(
    scheduler: dict[str, Any], said: str
) -> None:
    assert said in refusal({"scheduler": scheduler})


def test_a_warm_up_that_deepspeed_would_make_by_its_logarithm_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        deepspeed_config(RewardConfig(deepspeed=USUAL), "fp32", 1)
    assert "straight line" not in caplog.text
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        deepspeed_config(RewardConfig(deepspeed=USUAL, warmup_steps=3), "fp32", 1)
    assert "`deepspeed.scheduler` warms up in a straight line" in caplog.text


def test_a_section_beside_an_optimizer_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`optimizer_cls_and_kwargs` and the section `optimizer`"):
        check_one_optimizer(RewardConfig(deepspeed={"optimizer": {"type": "AdamW"}}))
    check_one_optimizer(RewardConfig(deepspeed={"zero_optimization": {"stage": 1}}))
    with pytest.raises(ConfigError, match="Delete the section"):
        RewardTrainer(
            tiny_model(),
            RewardConfig("unused", use_cpu=True, deepspeed={"optimizer": {"type": "AdamW"}}),
            train_dataset=["unused"],
            processing_class=tiny_tokenizer(),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )


DISK = {"device": "nvme", "nvme_path": "/local"}


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, "is for ZeRO stage 1, 2 or 3, and the stage is 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "is for ZeRO stage 3, and the stage is 2"),
        ({"stage": 2, "offload_optimizer": DISK}, "('nvme') is for ZeRO stage 3, and the stage is 2"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path` (None) must be an absolute path"),
        ({"stage": 3, "offload_param": {**DISK, "nvme_path": "x"}}, "nvme_path` ('x') must be an absolute"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, 'must be "none", "cpu" or "nvme"'),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio` (0.5) can only be 1"),
        ({"stage": 2, "cpu_offload": True}, 'cpu_offload` is a deprecated name. Write `"offload_optimizer"'),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow` needs an optimizer of DeepSpeed's"),
        ({"stage": 2, "zero_quantized_weights": True}, "(true) is for ZeRO stage 3, and the stage is 2"),
        ({"stage": 1, "zero_hpz_partition_size": 2}, "(2) is for ZeRO stage 3, and the stage is 1"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, "(0) must be a whole number from 1 on"),
    ],
    ids=str,
)
def test_offload_and_partitions_that_a_stage_does_not_have_are_refused(
    zero: dict[str, Any], said: str
) -> None:
    assert said in refusal({"zero_optimization": zero})


def test_a_run_keeps_what_it_offloads_to_a_disk_in_a_folder_of_its_own() -> None:
    table = {"zero_optimization": {"stage": 3, "offload_optimizer": DISK, "offload_param": {"device": "cpu"}}}
    made = deepspeed_config(RewardConfig(deepspeed=table), "fp32", 2)
    folder = Path(made["zero_optimization"]["offload_optimizer"]["nvme_path"])
    assert folder.parent == Path("/local")
    assert "nvme_path" not in made["zero_optimization"]["offload_param"]
    assert str(os.getpid()) in folder.name
    assert table["zero_optimization"]["offload_optimizer"] == DISK


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


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    assert "`deepspeed` has `stage` twice in one table" in refusal(str(file))


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
    # Gradients of linear layers are averaged in float32 too.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert made["torch_autocast"] == autocast
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


def test_what_stage_3_keeps_at_hand_goes_by_the_model_s_size_where_nothing_is_said() -> None:
    model = torch.nn.Linear(64, 100, bias=False)
    assert with_sizes({"stage": 3}, model, hidden_size=20) == {
        "stage": 3,
        "reduce_bucket_size": 400,
        "stage3_prefetch_bucket_size": 360,
        "stage3_param_persistence_threshold": 200,
        "stage3_max_live_parameters": 800,
        "stage3_max_reuse_distance": 800,
    }
    # DeepSpeed takes the last four without their prefix too.
    said = {"max_live_parameters": 5, "stage3_max_reuse_distance": 6, "reduce_bucket_size": 7}
    found = with_sizes(said, model, hidden_size=20)
    assert found == {
        **said,
        "stage3_prefetch_bucket_size": 360,
        "stage3_param_persistence_threshold": 200,
    }
