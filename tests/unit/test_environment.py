"""What the environment of who starts a run says to its ranks, and what of it a process takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rayrm.config import RewardConfig
from rayrm.train.environment import adopt, environment_of
from rayrm.train.job import TrainJob

NAMES = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_URI",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the one who starts a run says to a process that says nothing itself."""
    for name in NAMES:
        monkeypatch.setenv(name, f"the driver's {name}")
    told = environment_of(RewardConfig(report_to="wandb"))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # it is put back after the test
        del os.environ[name]
    return told


def test_it_names_the_hub_stores_and_the_trackers_that_are_told(driver: dict[str, str]) -> None:
    assert set(NAMES) - set(driver) == {"MLFLOW_TRACKING_URI"}
    adopt(driver)
    assert os.environ["HF_TOKEN"] == "the driver's HF_TOKEN"
    assert os.environ["AWS_SESSION_TOKEN"] == "the driver's AWS_SESSION_TOKEN"


def test_a_process_keeps_its_own_and_no_keys_are_mixed(driver: dict[str, str]) -> None:
    os.environ |= {"HF_TOKEN": "its own", "AWS_ACCESS_KEY_ID": "its own", "AWS_SECRET_ACCESS_KEY": "its own"}
    adopt(driver)
    assert os.environ["HF_TOKEN"] == os.environ["AWS_ACCESS_KEY_ID"] == "its own"
    assert "AWS_SESSION_TOKEN" not in os.environ
    assert os.environ["AWS_REGION"] == "the driver's AWS_REGION"
    assert os.environ["WANDB_API_KEY"] == "the driver's WANDB_API_KEY"


def test_a_job_s_words_hold_none_of_it(driver: dict[str, str]) -> None:
    """Ray Train shows what it is given as strings, where its state is tracked."""
    rest: Any = None
    job = TrainJob(
        config=RewardConfig("x", model_init_kwargs={"token": "hf_secret"}),
        source=rest,
        tokenizer=rest,
        text_form="standard",
        train_set=rest,
        eval_sets={},
        output_dir=Path("x"),
        max_tokens=None,
        environment=driver,
    )
    assert job.environment["WANDB_API_KEY"] == "the driver's WANDB_API_KEY"
    assert "the driver's" not in f"{job} {job!r}"
    assert "hf_secret" not in f"{job} {job!r}"
