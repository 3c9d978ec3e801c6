"""Sweeps that are cut off: killed in the middle, or told to leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from rayrm.train.checkpoint import checkpoints
from rayrm.train.records import read_progress, read_records
from tests.integration.test_resume import untimed, weights
from tests.integration.test_sweep import until, values

pytestmark = pytest.mark.ray

RUN = """
[model]
name = "base"
[data]
train = "pairs.jsonl"
eval = "near.jsonl"
[reward]
output_dir = "sweep"
bf16 = false
per_device_train_batch_size = 4
gradient_checkpointing = false
logging_steps = 1
eval_strategy = "steps"
"""
SWEEP = (
    RUN
    + """
max_steps = 60
save_steps = 10
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
)


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
def test_a_killed_sweep_of_trials_with_workers_goes_on_to_the_end(
    sweep_words: list[str], tmp_path: Path
) -> None:
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
    sweep_words: list[str], tmp_path: Path, number: signal.Signals, status: int
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
