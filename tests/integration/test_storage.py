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
from rayrm.train.checkpoint import MANIFEST, checkpoints
from rayrm.train.records import read_records
from rayrm.train.rundir import bring
from rayrm.train.storage import RunStorage, below, storage_environment
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
    (made / "engine").mkdir(parents=True, exist_ok=True)
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


def fetched_by(output_dir: Path, **settings: Any) -> list[str]:
    """The checkpoints of a run's directory after what a start that goes on does first."""
    bring(
        RewardConfig(str(output_dir), storage_path=ROOMS),
        output_dir,
        {"seed": 42, **settings},
        resume=True,
        automatic=False,
    )
    return [path.name for path in checkpoints(output_dir)]


def begun(output_dir: Path, *steps: int) -> Path:
    output_dir.mkdir(parents=True)
    (output_dir / "identity.json").write_text(json.dumps({"identity": {"seed": 42}}))
    (output_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    for step in steps:
        checkpoint(output_dir, step)
    return output_dir


def test_the_newest_of_disk_and_store_is_gone_on_from(bucket: Any, tmp_path: Path) -> None:
    first = begun(tmp_path / "first", 2, 10)
    store(first).keep(first / "checkpoint-10", None)
    # A disk of an earlier attempt, which another machine has gone on from since.
    behind = begun(tmp_path / "behind" / "first", 2, 4)
    assert fetched_by(behind) == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert [one["step"] for one in read_records(behind)] == [2, 10]
    ahead = begun(tmp_path / "ahead" / "first", 2, 12)
    assert fetched_by(ahead) == ["checkpoint-2", "checkpoint-12"]
    # And another run's store is none of ours, whatever the disk holds.
    with pytest.raises(RunDirectoryError, match=r"s3://rooms/runs/first\) holds another run.*seed"):
        fetched_by(ahead, seed=43)
    other = begun(tmp_path / "other" / "first", 2)
    (other / "identity.json").write_text(json.dumps({"identity": {"seed": 43}}))
    with pytest.raises(RunDirectoryError, match="holds another run"):
        fetched_by(other)
    assert json.loads((other / "identity.json").read_text()) == {"identity": {"seed": 43}}


def test_a_fetch_that_is_cut_off_leaves_no_checkpoint_and_the_next_one_brings_it(
    bucket: Any, tmp_path: Path
) -> None:
    first = begun(tmp_path / "first", 10)
    store(first).keep(first / "checkpoint-10", None)
    missing = "runs/first/checkpoint-10/engine/rank-0.safetensors"
    content = bucket.get_object(Bucket="rooms", Key=missing)["Body"].read()
    bucket.delete_object(Bucket="rooms", Key=missing)
    here = tmp_path / "elsewhere" / "first"
    with pytest.raises(CheckpointError, match="the run's copy in s3://rooms/runs/first cannot be read"):
        fetched_by(here)
    assert checkpoints(here) == []
    bucket.put_object(Bucket="rooms", Key=missing, Body=content)
    assert fetched_by(here) == ["checkpoint-10"]
    assert not list(here.glob(".*.partial"))


def test_a_copy_that_is_made_anew_looks_whole_only_when_it_is(bucket: Any, tmp_path: Path) -> None:
    first = tmp_path / "first"
    store(first).keep(checkpoint(first, 10), None)
    again = checkpoint(first, 10)
    (again / "engine" / "rank-0.safetensors").unlink()
    store(first).keep(again, None)  # cut off by the file that is not there
    assert store(first).checkpoints() == []
    store(first).keep(checkpoint(first, 10), None)
    assert store(first).checkpoints() == ["checkpoint-10"]


def test_a_directory_of_a_store_keeps_the_url_s_options() -> None:
    assert below("s3://rooms/runs/?region=here", "sweep") == "s3://rooms/runs/sweep?region=here"
    assert below("s3://rooms", "sweep") == "s3://rooms/sweep"


def test_workers_are_told_what_the_store_s_kind_reads_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, f"the driver's {name}")
    for url, name in (
        ("abfss://c@a.dfs.core.windows.net/runs", "AZURE_CLIENT_SECRET"),
        ("gcs://rooms/runs", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3a://rooms/runs", "AWS_ACCESS_KEY_ID"),
    ):
        told = storage_environment(RewardConfig("x", storage_path=url))
        assert told[name] == f"the driver's {name}"
        assert {"AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS"} & set(told) <= {name}
    assert storage_environment(RewardConfig("x")) == {}


def test_a_store_that_takes_nothing_is_refused_at_once_and_later_named(
    base: Path, bucket: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"`storage_path` \(s3://nowhere/runs\) takes no object.*set .* AWS_ACCESS_KEY_ID"
    ):
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
