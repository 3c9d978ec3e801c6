"""What wandb, MLflow and trackio hold of a run that was cut off and went on: read back from them, offline."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import struct
import sys
import time
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, MissingExtraError
from rayrm.train.checkpoint import TrainState
from rayrm.train.environment import adopt
from rayrm.train.records import RunLog, read_records
from rayrm.train.trackers import check_trackers, tool_name, tracker_environment

RUN_TOML = '[model]\nname = "base"\n\n[reward]\nlearning_rate = 3e-5\n'
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = tmp_path / "first"
    made.mkdir()
    (made / "run.toml").write_text(RUN_TOML)
    return made


def record(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 4, "loss": 1 / step, "learning_rate": 1e-5 * step}


def evaluation(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 4, "eval_accuracy": 1 - 1 / step}


def cut_off_and_resumed(output_dir: Path, config: RewardConfig) -> None:
    """Records of steps 2, 4 and, after a checkpoint of step 2, of 4 again, 6 and the end."""
    first = RunLog(output_dir, config, active=True)
    first.begin(0)
    for one in (record(2), evaluation(2), record(4)):
        first.write(one)
    # A killed process ends nothing; its tools' threads are let go, for this one lives on.
    first.close()
    second = RunLog(output_dir, config, active=True)
    second.begin(2)
    for one in (record(4), evaluation(4), record(6)):
        second.write(one)
    second.summarize(TrainState(step=6, epoch=1.5, loss_sum=3.0))
    second.close()


def expected(output_dir: Path) -> Points:
    points: Points = defaultdict(list)
    for one in read_records(output_dir):
        for key, value in one.items():
            if key not in ("step", "epoch"):  # the epoch stands beside each record, also of one step
                points[tool_name(key)].append((one["step"], value))
    assert points["train/loss"] == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    assert points["eval/accuracy"] == [(2, 1 / 2), (4, 3 / 4)]
    assert points["train/train_loss"] == [(6, 0.5)]
    return dict(points)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def finished_wandb_records(file: Path) -> list[Any]:
    """What wandb's own process has written when the run's end is in the file."""
    for _ in range(600):
        found = list(wandb_records(file))
        if any(one.HasField("exit") for one in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def test_wandb_holds_each_record_once_in_one_run(output_dir: Path) -> None:
    pytest.importorskip("wandb")
    cut_off_and_resumed(output_dir, RewardConfig(report_to="wandb", run_name="a name", project="ours"))
    points: Points = defaultdict(list)
    runs, settings, own = set(), {}, []
    # Offline, wandb keeps each start in a directory of its own; `wandb sync` joins those of one id.
    for file in sorted((output_dir / "wandb").glob("offline-run-*/*.wandb")):
        for one in finished_wandb_records(file):
            if one.HasField("run"):
                runs.add((one.run.run_id, one.run.project, one.run.display_name))
                settings |= {item.key: json.loads(item.value_json) for item in one.run.config.update}
            if one.HasField("history"):
                found = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in one.history.item}
                own.append(found["_step"])
                for key, value in found.items():
                    if key.startswith(("train/", "eval/")) and key != "train/global_step":
                        points[key].append((found["train/global_step"], value))
    [run] = runs
    assert run == (json.loads((output_dir / "trackers.json").read_text())["wandb"], "ours", "a name")
    assert settings["reward.learning_rate"] == 3e-5
    assert own == [2, 4, 4, 6]  # of one step one row, but for what the second start adds to its
    assert points.pop("train/epoch")[-1] == (6, 1.5)
    assert dict(points) == expected(output_dir)


def test_mlflow_holds_each_record_once_in_one_run(output_dir: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    cut_off_and_resumed(output_dir, RewardConfig(report_to="mlflow"))
    client = mlflow.MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    [run] = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"model.name": "base", "reward.learning_rate": "3e-05"}
    found = {
        key: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    assert found.pop("train/epoch")[-1] == (6, 1.5)
    assert found == expected(output_dir)


def test_mlflow_goes_on_in_another_run_where_its_own_file_is_lost(output_dir: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    config = RewardConfig(report_to="mlflow")
    first = RunLog(output_dir, config, active=True)
    first.begin(0)
    first.write(record(2))
    first.close()
    elsewhere = output_dir.parent / "elsewhere" / "first"
    elsewhere.mkdir(parents=True)
    for name in ("run.toml", "metrics.jsonl", "trackers.json"):  # what a store's copy of the run brings
        shutil.copy(output_dir / name, elsewhere / name)
    second = RunLog(elsewhere, config, active=True)
    second.begin(2)
    second.write(record(4))
    second.close()
    client = mlflow.MlflowClient(f"sqlite:///{elsewhere / 'mlflow.db'}")
    [run] = client.search_runs(["0"])
    assert run.info.run_id == json.loads((elsewhere / "trackers.json").read_text())["mlflow"]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == [4]


def test_trackio_holds_each_record_once_in_one_run(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    cut_off_and_resumed(output_dir, RewardConfig(report_to="trackio", project="ours"))
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("ours")
    assert name == json.loads((output_dir / "trackers.json").read_text())["trackio"]
    points: Points = defaultdict(list)
    for one in SQLiteStorage.get_logs("ours", name):
        for key, value in one.items():
            if key.startswith(("train/", "eval/")):
                points[key].append((one["step"], value))
    assert points.pop("train/epoch")[-1] == (6, 1.5)
    assert dict(points) == expected(output_dir)
    assert capsys.readouterr().out == ""  # stdout is the command's own


def test_trackio_s_runs_of_one_name_stay_apart_when_one_goes_on(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    config = RewardConfig(report_to="trackio", project="ours", run_name="one name")
    other = tmp_path / "second"
    other.mkdir()
    for directory, begin, step in ((output_dir, 0, 2), (other, 0, 2), (output_dir, 2, 4)):
        log = RunLog(directory, config, active=True)
        log.begin(begin)
        log.write(record(step))
        log.close()
    from trackio.sqlite_storage import SQLiteStorage

    steps = {
        directory.name: [
            one["step"]
            for one in SQLiteStorage.get_logs(
                "ours", json.loads((directory / "trackers.json").read_text())["trackio"]
            )
        ]
        for directory in (output_dir, other)
    }
    assert steps == {"first": [2, 4], "second": [2]}
    assert len(SQLiteStorage.get_runs("ours")) == 2


def fake(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = types.ModuleType("wandb")
    module.__dict__.update(run=None, init=init, Settings=lambda **_: None)
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None, origin="here")
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_tool_that_does_not_start_ends_a_run_at_its_beginning_alone(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: Any) -> Any:
        raise RuntimeError("no API key")

    fake(monkeypatch, init)
    log = RunLog(output_dir, RewardConfig(report_to="wandb"), active=True)
    with pytest.raises(ConfigError, match=r"`report_to` \('wandb'\) did not start.*no API key"):
        log.begin(0)
    log.begin(2)
    log.write(record(4))
    assert "goes on without it" in caplog.text
    assert [one["step"] for one in read_records(output_dir)] == [4]


def test_a_tool_that_fails_is_left_out_with_a_warning(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[float] = []

    class Run:
        id = "one"
        offline = False

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def finish(self) -> None: ...

        def log(self, values: dict[str, float]) -> None:
            told.append(values["train/loss"])
            if len(told) == 2:
                raise OSError("the server is gone")

    fake(monkeypatch, lambda **_: Run())
    log = RunLog(output_dir, RewardConfig(report_to="wandb"), active=True)
    log.begin(0)
    for step in (2, 4, 6):
        log.write(record(step))
    log.close()
    assert told == [1 / 2, 1 / 4]
    assert "wandb takes no more records (OSError: the server is gone)" in caplog.text
    assert [one["step"] for one in read_records(output_dir)] == [2, 4, 6]


def test_a_tool_that_is_not_installed_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    check_trackers(["tensorboard"])
    with pytest.raises(MissingExtraError, match=r"`report_to` \('trackio'\).*pip install trackio"):
        check_trackers(["tensorboard", "trackio"])


def test_a_worker_is_told_the_environment_of_the_named_tools_and_keeps_its_own(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_SERVICE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(key, "the driver's")
    told = tracker_environment(["wandb"])
    assert "MLFLOW_TRACKING_URI" not in told
    assert "WANDB_SERVICE" not in told
    assert told["WANDB_API_KEY"] == "the driver's"
    assert tracker_environment([]) == {}
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_PROJECT", "the worker's")
    seen: dict[str, str] = {}

    def init(**given: Any) -> Any:
        seen.update(project=given["project"], key=os.environ["WANDB_API_KEY"])
        raise RuntimeError

    fake(monkeypatch, init)
    adopt(told)
    RunLog(output_dir, RewardConfig(report_to="wandb"), active=True).begin(2)
    monkeypatch.delenv("WANDB_API_KEY")
    assert seen == {"project": "the worker's", "key": "the driver's"}


@pytest.mark.parametrize(
    ("key", "name"), [("loss", "train/loss"), ("eval_easy_loss", "eval/easy_loss"), ("epoch", "train/epoch")]
)
def test_names_are_those_of_transformers_callbacks(key: str, name: str) -> None:
    from transformers.integrations.integration_utils import rewrite_logs

    assert tool_name(key) == name
    assert rewrite_logs({key: math.pi}) == {name: math.pi}


def test_tensorboard_holds_how_rewards_are_spread(output_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(output_dir, RewardConfig(str(output_dir), report_to=["tensorboard"]), active=True)
    log.begin(0)
    log.histograms(4, {"eval/chosen_reward": np.array([1.0, 2.0, 2.0, 9.0])})
    log.close()
    held = EventAccumulator(str(output_dir / "tensorboard"))
    held.Reload()
    (shown,) = held.Histograms("eval/chosen_reward")
    told = shown.histogram_value
    assert (shown.step, told.num, told.min, told.max, told.sum) == (4, 4, 1.0, 9.0, 14.0)


def test_other_tools_are_told_no_histograms(output_dir: Path) -> None:
    log = RunLog(output_dir, RewardConfig(str(output_dir)), active=True)
    log.begin(0)
    log.histograms(4, {"eval/chosen_reward": np.array([1.0])})
    log.close()
    assert not (output_dir / "tensorboard").exists()
