"""Sweeps by Ray Tune on a tiny model: the best published, failures shown, and early stops."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.util import placement_group_table
from safetensors.torch import load_file

from rayrm import cli
from rayrm.errors import RayrmError
from rayrm.sweep_settings import read_sweep
from rayrm.train.checkpoint import checkpoints
from rayrm.train.records import read_progress, read_records
from rayrm.train.sweep import run_sweep
from tests.integration.test_resume import weights

pytestmark = pytest.mark.ray


def values(directory: Path, key: str) -> list[float]:
    return [record[key] for record in read_records(directory) if key in record]


def test_the_best_by_one_evaluation_set_is_named_published_and_drawn(
    sweep_words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    metric = "eval_far_loss"
    words = ["sweep.publish=best", "--metric", metric, "--param", "learning_rate=0,1e-2"]
    words += ["--param", "max_length=64,3", "--max-concurrent", "2"]
    assert cli.main(["sweep", *sweep_words, *words]) == 0
    out = capfd.readouterr().out
    heading, best = out.index("trial  "), out.index("\nbest: ")
    lines = out[heading:best].splitlines()
    table = [line.split() for line in lines[1:5]]
    assert [row[:3] for row in table] == [
        ["trial-01", "0", "64"],
        ["trial-02", "0", "3"],
        ["trial-03", "1e-2", "64"],
        ["trial-04", "1e-2", "3"],
    ]
    # A rate of zero trains nothing: its trial stays at the fresh head's loss. Three tokens are no row.
    losses = [values(Path("sweep", name), metric)[-1] for name in ("trial-01", "trial-03")]
    assert losses[1] < losses[0]
    assert [table[0][3], *table[2][3:]] == [f"{losses[0]:.4f}", f"{losses[1]:.4f}", "best"]
    assert [row[3:] for row in (table[1], table[3])] == [["failed"], ["failed"]]
    reasons = [line for line in lines if " failed: all 24 rows of train" in line]
    assert [line.split()[0] for line in reasons] == ["trial-02", "trial-04"]
    assert out[heading:best].count("raise `max_length` to keep the row") == 2
    record = json.loads(Path("sweep/sweep.json").read_text())
    assert record["best"]["directory"] == "trial-03"
    assert record["best"]["metric"] == losses[1]
    assert "eval_far_loss" in Path("sweep/sweep.html").read_text()
    published = Path("registry/best") / json.loads(Path("registry/best/current.json").read_text())["version"]
    assert load_file(published / "model.safetensors").keys() == weights(Path("sweep/trial-03")).keys()


def test_a_sweep_whose_trials_all_fail_is_an_error_with_the_reasons(sweep_words: list[str]) -> None:
    with pytest.raises(RayrmError) as failure:
        run_sweep(
            read_sweep(None, [*sweep_words, "sweep.metric=eval_near_loss"]),
            ["model.lora.target_modules=absent_one,absent_two"],
        )
    assert "absent_one" in str(failure.value)
    assert "absent_two" in str(failure.value)
    assert json.loads(Path("sweep/sweep.json").read_text())["best"] is None


def until(done: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < 1500, what
        if process is not None and process.poll() is not None:
            told, _ = process.communicate()
            pytest.fail(f"{what}; the process ended with {process.returncode}:\n{told}")
        time.sleep(0.02)


def test_no_file_below_a_sweep_holds_a_token(sweep_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Tune writes while trials run goes at the end: here it stays, as after a kill."""
    token = "hf_secret_of_this_test"
    monkeypatch.setenv("HF_TOKEN", f"{token}_of_the_environment")
    monkeypatch.setattr("rayrm.train.sweep.shutil.rmtree", lambda *_, **__: None)
    words = [f"hub_token={token}", "sweep.metric=eval_near_loss", "max_steps=2"]
    sweep = run_sweep(read_sweep(None, [*sweep_words, *words]), ["learning_rate=1e-3"])
    assert sweep.best is not None
    kept = [file for file in Path("sweep").rglob("*") if file.is_file()]
    assert {"params.pkl", "tuner.pkl", "run.toml", "sweep.json"} <= {file.name for file in kept}
    # Pickles within text are written as hexadecimal digits.
    for said in (token.encode(), token.encode().hex().encode()):
        assert not [file for file in kept if said in file.read_bytes()]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.slow
def test_the_trackers_of_trials_are_told_as_those_of_a_run_and_each_trial_is_one_run(
    sweep_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    import mlflow

    uri = f"sqlite:///{tmp_path / 'all.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    words = ["report_to=mlflow", "sweep.metric=eval_near_loss", "max_steps=2", "sweep.max_concurrent=1"]
    run_sweep(read_sweep(None, [*sweep_words, *words, "cluster.num_workers=1"]), ["learning_rate=1e-3,1e-2"])
    runs = mlflow.MlflowClient(uri).search_runs(["0"])
    assert {run.info.run_name for run in runs} == {"sweep-trial-01", "sweep-trial-02"}
    assert all("eval/near_loss" in run.data.metrics for run in runs)


@pytest.mark.slow
def test_a_trial_that_halving_stops_frees_its_workers_and_their_placement_group(
    sweep_words: list[str],
) -> None:
    words = ["cluster.num_workers=2", "eval_strategy=steps", "eval_steps=20", "sweep.scheduler=asha"]
    settings = ["sweep.grace=25", "sweep.reduction=2", "sweep.metric=eval_near_loss", "max_steps=400"]
    file = read_sweep(None, [*sweep_words, *words, *settings, "sweep.max_concurrent=4"])

    def alive() -> set[str]:
        # What `ray.util.state.list_actors` tells, which asks the dashboard.
        names = ("RayTrainWorker", "TrainController", "SweepTrial")
        known = actors().items()
        return {name for name, one in known if one["State"] == "ALIVE" and one["ActorClassName"] in names}

    before = alive()
    # One after the other: four CPUs have room for one trial of two workers. The others train nothing.
    sweep = run_sweep(file, ["learning_rate=1e-3,0,0.0"])
    whole, *stopped = sweep.trials
    assert sweep.best == whole
    assert whole.stopped_at is None
    for trial in stopped:
        assert trial.stopped_at is not None
        assert 25 <= trial.stopped_at < 100
        assert trial.metric == values(trial.directory, "eval_near_loss")[-1]
        # They saved after the step they were in; without a model they are not the best.
        assert [read_progress(trial.directory)[key] for key in ("finished", "num_steps")] == [False, 400]
        assert checkpoints(trial.directory)
        assert not (trial.directory / "model.safetensors").exists()
    until(lambda: ray.available_resources().get("CPU") == 4, "CPUs are not free")
    groups = placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}
    # The record of an actor that ends comes a moment after its CPUs.
    until(lambda: not alive() - before, "actors are left")
