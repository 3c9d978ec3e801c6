"""Sweeps by Ray Tune on a tiny model: the best published, failures shown, early stops, and real kills."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
from safetensors.torch import load_file

from rayrm import cli
from rayrm.errors import RayrmError
from rayrm.sweep_settings import read_sweep
from rayrm.train.checkpoint import checkpoints
from rayrm.train.records import read_progress, read_records
from rayrm.train.sweep import run_sweep
from tests.integration.test_cli import write_rows
from tests.integration.test_resume import untimed, weights
from tests.tiny import save_tiny, tiny_rows

pytestmark = pytest.mark.ray


@pytest.fixture
def base(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a tiny run, with relative paths: trials have current directories of their own."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    for name, seed in (("near", 5), ("far", 6)):
        write_rows(tmp_path / f"{name}.jsonl", tiny_rows(16, seed=seed, conversational=True))
    return [
        "model.name=base",
        "data.train=pairs.jsonl",
        'data.eval={near="near.jsonl", far="far.jsonl"}',
        "output_dir=sweep",
        "bf16=false",
        "max_steps=8",
        "per_device_train_batch_size=4",
        "gradient_checkpointing=false",
        "save_strategy=no",
        "sweep.mode=min",
    ]


def values(directory: Path, key: str) -> list[float]:
    return [record[key] for record in read_records(directory) if key in record]


def test_the_best_by_one_evaluation_set_is_named_published_and_drawn(
    base: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    metric = "eval_far_loss"
    words = ["sweep.publish=best", "--metric", metric, "--param", "learning_rate=0,1e-2"]
    assert cli.main(["sweep", *base, *words, "--param", "max_length=64,3", "--max-concurrent", "2"]) == 0
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


def test_a_sweep_whose_trials_all_fail_is_an_error_with_the_reasons(base: list[str]) -> None:
    with pytest.raises(RayrmError) as failure:
        run_sweep(
            read_sweep(None, [*base, "sweep.metric=eval_near_loss"]),
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


def test_no_file_below_a_sweep_holds_a_token(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Tune writes while trials run goes at the end: here it stays, as after a kill."""
    token = "hf_secret_of_this_test"
    monkeypatch.setenv("HF_TOKEN", f"{token}_of_the_environment")
    monkeypatch.setattr("rayrm.train.sweep.shutil.rmtree", lambda *_, **__: None)
    words = [f"hub_token={token}", "sweep.metric=eval_near_loss", "max_steps=2"]
    sweep = run_sweep(read_sweep(None, [*base, *words]), ["learning_rate=1e-3"])
    assert sweep.best is not None
    kept = [file for file in Path("sweep").rglob("*") if file.is_file()]
    assert {"params.pkl", "tuner.pkl", "run.toml", "sweep.json"} <= {file.name for file in kept}
    # Pickles within text are written as hexadecimal digits.
    for said in (token.encode(), token.encode().hex().encode()):
        assert not [file for file in kept if said in file.read_bytes()]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.slow
def test_the_trackers_of_trials_are_told_as_those_of_a_run_and_each_trial_is_one_run(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    import mlflow

    uri = f"sqlite:///{tmp_path / 'all.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    words = ["report_to=mlflow", "sweep.metric=eval_near_loss", "max_steps=2", "sweep.max_concurrent=1"]
    run_sweep(read_sweep(None, [*base, *words, "cluster.num_workers=1"]), ["learning_rate=1e-3,1e-2"])
    runs = mlflow.MlflowClient(uri).search_runs(["0"])
    assert {run.info.run_name for run in runs} == {"sweep-trial-01", "sweep-trial-02"}
    assert all("eval/near_loss" in run.data.metrics for run in runs)


@pytest.mark.slow
def test_a_trial_that_halving_stops_frees_its_workers_and_their_placement_group(base: list[str]) -> None:
    words = ["cluster.num_workers=2", "eval_strategy=steps", "eval_steps=20", "sweep.scheduler=asha"]
    settings = ["sweep.grace=25", "sweep.reduction=2", "sweep.metric=eval_near_loss", "max_steps=400"]
    file = read_sweep(None, [*base, *words, *settings, "sweep.max_concurrent=4"])
    # Without an address `list_actors` asks the Ray that this machine started last, whoever's it is.
    own = ray.get_runtime_context().gcs_address

    def alive() -> set[str]:
        actors = list_actors(own, filters=[("state", "=", "ALIVE")])
        names = ("RayTrainWorker", "TrainController", "SweepTrial")
        return {actor.actor_id for actor in actors if actor.class_name in names}

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


SWEEP = """
[model]
name = "base"
[data]
train = "pairs.jsonl"
eval = "near.jsonl"
[reward]
output_dir = "sweep"
bf16 = false
max_steps = 60
per_device_train_batch_size = 4
gradient_checkpointing = false
logging_steps = 1
save_steps = 10
eval_strategy = "steps"
eval_steps = 20
zero_stage = 2
[cluster]
num_workers = 2
[sweep]
metric = "eval_loss"
mode = "min"
max_concurrent = 3
publish = "best"
[sweep.space]
learning_rate = [1e-3, 1e-2]
save_total_limit = [2, 3, 4] # of one rate all trials take the same steps
"""


def start_sweep(home: Path, *words: str) -> subprocess.Popen[str]:
    """A process of its own, as a job of the tests' cluster."""
    return subprocess.Popen(
        [sys.executable, "-m", "rayrm.cli", "sweep", "sweep.toml", *words],
        cwd=home,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(3000)
def test_a_killed_sweep_of_trials_with_workers_goes_on_to_the_end(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP)
    trials = [tmp_path / "sweep" / f"trial-{number:02d}" for number in range(1, 7)]
    with start_sweep(tmp_path) as first:
        until(lambda: checkpoints(trials[1]), "the second trial saved nothing", first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert not read_progress(trials[1])["finished"]
    assert not trials[2].exists()
    before = (trials[0] / "metrics.jsonl").stat().st_mtime_ns
    with start_sweep(tmp_path) as second:
        told, _ = second.communicate()
    assert second.returncode == 0, told
    assert "going on with the sweep" in told
    assert "resuming after step" in told
    assert "the cluster has room for 1 at once" in told
    # The first is not run again; of the second no step is lost or doubled, and none differs.
    assert (trials[0] / "metrics.jsonl").stat().st_mtime_ns == before
    for trial in trials:
        assert read_progress(trial)["finished"]
        assert [record["step"] for record in read_records(trial) if "loss" in record] == list(range(1, 61))
        assert [record["step"] for record in read_records(trial) if "eval_loss" in record] == [20, 40, 60]
    assert untimed(trials[1]) == untimed(trials[0]) == untimed(trials[2])
    assert untimed(trials[3]) == untimed(trials[4]) == untimed(trials[5])
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [one["metric"] for one in record["trials"]] == [values(trial, "eval_loss")[-1] for trial in trials]
    assert record["best"]["metric"] == min(one["metric"] for one in record["trials"])
    best = tmp_path / "sweep" / record["best"]["directory"]
    version = json.loads((tmp_path / "registry/best/current.json").read_text())["version"]
    published = load_file(tmp_path / "registry/best" / version / "model.safetensors")
    assert all((published[name] == tensor).all() for name, tensor in weights(best).items())


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 75)]
)
def test_a_sweep_that_is_told_to_leave_saves_and_has_the_status_of_the_signal(
    base: list[str], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP)
    trial = tmp_path / "sweep" / "trial-01"
    with start_sweep(tmp_path, "cluster.num_workers=0", "max_steps=2000", "save_steps=1000") as running:
        until(lambda: values(trial, "loss"), "the first trial made no step", running)
        running.send_signal(number)
        told, _ = running.communicate()
    assert running.returncode == status, told
    # It saved after the step that it was in, and nothing was told before.
    standing = read_progress(trial)
    assert [path.name for path in checkpoints(trial)] == [f"checkpoint-{standing['step']}"]
    assert 0 < standing["step"] < 1000
    assert not standing["finished"]
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record["trials"][0]["metric"] is None
    assert not (tmp_path / "sweep" / ".stop").exists()
