"""An optimizer and a schedule in memory train as in TRL's trainer; where they cannot, that is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from ray.train import ScalingConfig

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError
from tests.integration.test_trl_scripts import OfThisMachine
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "bf16": False, "use_cpu": True, "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip


def made(model: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Unlike what any setting makes: the head learns ten times as fast, and every second step halves it."""
    head = [p for name, p in model.named_parameters() if name.startswith("score")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("score")]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": head, "lr": 0.5}], lr=0.05, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def trainer_of(directory: Path, model: Any, **given: Any) -> RewardTrainer:
    settings = {**SETTINGS, **given.pop("settings", {})}
    return RewardTrainer(
        model,
        RewardConfig(str(directory), **settings),
        train_dataset=tiny_rows(16),
        processing_class=tiny_tokenizer(bos=True),
        **given,
    )


@pytest.mark.parametrize("schedules", [True, False])
def test_they_train_as_in_trl(ray_cluster: None, tmp_path: Path, schedules: bool) -> None:
    logs = []
    for library in ("theirs", "ours"):
        model = tiny_model(seed=1)
        optimizer, scheduler = made(model)
        optimizers = (optimizer, scheduler if schedules else None)
        if library == "theirs":
            trainer: Any = trl.RewardTrainer(
                model=model,
                args=OfThisMachine(str(tmp_path / library), **SETTINGS),
                train_dataset=Dataset.from_list(tiny_rows(16)),
                processing_class=tiny_tokenizer(bos=True),
                optimizers=optimizers,
            )
        else:
            trainer = trainer_of(tmp_path / library, model, optimizers=optimizers)
        trainer.train()
        logs.append([record for record in trainer.state.log_history if "loss" in record])
    for key in ("loss", "grad_norm", "learning_rate"):
        theirs, ours = ([record[key] for record in log] for log in logs)
        assert ours == pytest.approx(theirs, abs=1e-5), key
    assert logs[1][0]["loss"] - logs[1][-1]["loss"] > 1e-3


def test_where_they_cannot_train_that_is_said(ray_cluster: None, tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    optimizer, scheduler = made(model)
    two = ScalingConfig(num_workers=2)
    adamw = (torch.optim.AdamW, {"lr": 1e-3})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optimizers": (None, scheduler)}, "has a scheduler and no optimizer"),
        ({"optimizer_cls_and_kwargs": adamw}, "comes together with `optimizer_cls_and_kwargs`"),
        ({"scaling_config": two}, "is in this process's memory"),
        ({"settings": {"zero_stage": 0}}, "ZeRO cuts anew"),
        ({"peft_config": peft.LoraConfig(target_modules=["q_proj"])}, "was made before the adapter"),
        ({"optimizers": (3, None)}, "has a int, which is no `torch.optim.Optimizer`"),
        ({"optimizers": made(tiny_model())}, "parameters are not the model's"),
    ]
    for given, said in cases:
        with pytest.raises(ConfigError, match=re.escape(said)):
            trainer_of(tmp_path / "run", model, **{"optimizers": (optimizer, scheduler), **given})


def test_a_run_is_known_again_by_its_optimizer(ray_cluster: None, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3}
    model = tiny_model(seed=1)
    trainer_of(tmp_path / "run", model, optimizers=made(model), settings=settings).train()
    for place in (tmp_path / "run").glob("progress.json"):
        place.unlink()
    again = tiny_model(seed=1)
    other = (torch.optim.SGD(again.parameters(), lr=0.7), None)
    with pytest.raises(Exception, match="optimizer"):
        trainer_of(tmp_path / "run", again, optimizers=other, settings=settings).train(True)
