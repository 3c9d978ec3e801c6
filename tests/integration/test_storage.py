"""A run whose disk is lost goes on from its copy in an object store, and ends with the same bits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import CheckpointError, ConfigError, RunDirectoryError
from rayrm.train.checkpoint import MANIFEST
from rayrm.train.records import read_records
from rayrm.train.storage import RunStorage, storage_environment
from tests.s3 import s3_server
from tests.tiny import save_tiny, tiny_rows

ROOMS = "s3://rooms/runs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with s3_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="rooms")
        yield client


class Lost(TrainerCallback):
    """The machine goes after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("the machine is gone")


def trainer_of(base: Path, output_dir: Path, *, callbacks: Any = None, **settings: Any) -> RewardTrainer:
    config = RewardConfig(
        str(output_dir),
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        save_total_limit=2,
        per_device_train_batch_size=2,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        max_tokens_per_microbatch=400,
        **settings,
    )
    rows = tiny_rows(20, conversational=True)
    return RewardTrainer(str(base), config, train_dataset=rows, callbacks=callbacks)


def keys(bucket: Any) -> list[str]:
    return [one["Key"] for one in bucket.list_objects_v2(Bucket="rooms").get("Contents", [])]


def checkpoints_in(bucket: Any) -> set[str]:
    return {key.split("/")[-2] for key in keys(bucket) if key.endswith(MANIFEST)}


@pytest.mark.ray
def test_a_run_whose_disk_is_lost_goes_on_from_its_copy(
    base: Path, bucket: Any, tmp_path: Path, ray_cluster: None
) -> None:
    trainer_of(base, tmp_path / "whole").train()
    lost = trainer_of(base, tmp_path / "first", storage_path=ROOMS, callbacks=[Lost()])
    with pytest.raises(Exception, match="the machine is gone"):
        lost.train()
    assert checkpoints_in(bucket) == {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(tmp_path / "first")

    again = trainer_of(base, tmp_path / "first", storage_path=ROOMS)
    with pytest.raises(RunDirectoryError, match=r"s3://rooms/runs/first` holds a run that did not finish"):
        again.train()
    assert not (tmp_path / "first").exists()
    other = trainer_of(base, tmp_path / "first", storage_path=ROOMS, learning_rate=1.0)
    with pytest.raises(RunDirectoryError, match=r"s3://rooms/runs/first\) holds another run.*learning_rate"):
        other.train(resume_from_checkpoint=True)

    again.train(resume_from_checkpoint=True)
    assert [one["step"] for one in read_records(tmp_path / "first")] == [*range(1, 9), 8]
    mine, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "whole"))
    assert all(mine[name].equal(whole[name]) for name in whole)
    # The store holds what the disk holds: the limit's checkpoints, and the model.
    assert checkpoints_in(bucket) == {"checkpoint-6", "checkpoint-8"}
    stored = bucket.get_object(Bucket="rooms", Key="runs/first/model.safetensors")["Body"].read()
    assert stored == (tmp_path / "first" / "model.safetensors").read_bytes()
    assert {"runs/first/config.json", "runs/first/metrics.jsonl", "runs/first/run.toml"} <= set(keys(bucket))
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(RunDirectoryError, match=r"the run in `s3://rooms/runs/first` is finished"):
        trainer_of(base, tmp_path / "first", storage_path=ROOMS).train(resume_from_checkpoint=True)


def store(output_dir: Path) -> RunStorage:
    config = RewardConfig(str(output_dir), storage_path=ROOMS)
    return RunStorage(ROOMS, output_dir, storage_environment(config))


def checkpoint(output_dir: Path, step: int, best: str | None = None) -> Path:
    made = output_dir / f"checkpoint-{step}"
    (made / "engine").mkdir(parents=True)
    (made / "engine" / "rank-0.safetensors").write_bytes(bytes([step]) * 100)
    (made / "state.json").write_text(json.dumps({"best_checkpoint": best}))
    files = {"engine/rank-0.safetensors": {}, "state.json": {}}
    (made / MANIFEST).write_text(json.dumps({"files": files}))
    return made


def test_a_copy_without_its_list_is_none_and_the_newest_whole_one_is_fetched(
    bucket: Any, tmp_path: Path
) -> None:
    there = store(tmp_path / "first")
    for step in (2, 10):
        there.keep(checkpoint(tmp_path / "first", step), None)
    there.write("checkpoint-12/engine/rank-0.safetensors", b"cut off")
    assert there.checkpoints() == ["checkpoint-2", "checkpoint-10"]
    (tmp_path / "elsewhere").mkdir()
    here = tmp_path / "elsewhere" / "first"
    store(here).fetch()
    assert [path.name for path in here.iterdir()] == ["checkpoint-10"]
    assert (here / "checkpoint-10/engine/rank-0.safetensors").read_bytes() == bytes([10]) * 100


def test_the_limit_keeps_the_best_and_a_fetch_brings_it(bucket: Any, tmp_path: Path) -> None:
    there = store(tmp_path / "first")
    for step in (2, 4, 6, 8):
        there.keep(checkpoint(tmp_path / "first", step, best="checkpoint-4" if step > 2 else None), 2)
    assert there.checkpoints() == ["checkpoint-4", "checkpoint-8"]
    assert {key.split("/")[2] for key in keys(bucket) if key[-1] != "/"} == {"checkpoint-4", "checkpoint-8"}
    shutil.rmtree(tmp_path / "first")
    there.fetch()
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"checkpoint-4", "checkpoint-8"}


def test_a_store_that_takes_nothing_is_refused_at_once_and_later_named(
    base: Path, bucket: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"`storage_path` \(s3://nowhere/runs\) takes no object"):
        trainer_of(base, tmp_path / "first", storage_path="s3://nowhere/runs")
    there = store(tmp_path / "first")
    made = checkpoint(tmp_path / "first", 2)
    bucket.delete_bucket(Bucket="rooms")
    monkeypatch.setattr(logging.getLogger("rayrm"), "propagate", True)
    there.keep(made, None)
    assert "checkpoint-2 could not be copied to s3://rooms/runs/first" in caplog.text
    (tmp_path / "first" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model is in .*first, but it could not be copied"):
        there.keep_result()
