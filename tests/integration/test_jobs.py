"""The scripts in jobs/ as Ray jobs run them, and the examples, on a tiny model.

A job is a process whose RAY_ADDRESS names the cluster: the fast test gives it the tests' own. The slow one
starts one that has a dashboard, which takes jobs, and submits to it by `ray job submit`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from examples import colocated, quickstart, trl_migration
from rayrm.errors import PublishError
from rayrm.serve.registry import publish
from tests.served import free_port
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    answers = [{"completion": [{"role": "assistant", "content": text}]} for text in ("yes", "never")]
    write_rows(tmp_path / "answers.jsonl", answers)
    return tmp_path


def job(home: Path, script: str, *words: str) -> str:
    """Run jobs/<script> in `home` as a job of the tests' cluster; returns its stdout."""
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / script), *words],
        cwd=home,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jobs_train_evaluate_publish_and_score_on_the_cluster_they_are_given(
    ray_cluster: None, home: Path
) -> None:
    out = job(
        home,
        "train.py",
        str(ROOT / "jobs" / "first.toml"),
        "model.name=base",
        "data.train=pairs.jsonl",
        "data.eval=pairs.jsonl",
        "bf16=false",
        "max_steps=2",
    )
    assert "trained 2 steps" in out
    assert (home / "runs/first/model.safetensors").is_file()
    assert "pairs.jsonl" in job(home, "evaluate.py", "runs/first", "pairs.jsonl")
    assert "reward" in job(home, "publish.py", "runs/first")
    scores = [
        json.loads(line)["score"] for line in job(home, "score.py", "reward", "answers.jsonl").splitlines()
    ]
    assert len(set(scores)) == 2


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The URL of a cluster's dashboard."""
    taken = {
        name: free_port()
        for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # the names of Ray's sockets have a limit
        line = [*RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={short}"]
        line += [f"--{name}={number}" for name, number in taken.items()]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield f"http://127.0.0.1:{taken['dashboard-port']}"
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_submitted_job_logs_its_records_in_its_runtime_environment(dashboard: str, home: Path) -> None:
    def submit(*words: str) -> tuple[int, str]:
        environment = dict(os.environ)
        if (Path.home() / ".ray" / "auth_token").is_file():
            environment["RAY_AUTH_MODE"] = "token"
        variables = json.dumps({"env_vars": {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}})
        line = [*RAY, "job", "submit", "--address", dashboard]
        line += ["--runtime-env-json", variables, "--", sys.executable, str(ROOT / "jobs/train.py"), *words]
        for _ in range(60):
            done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
            # A cluster that is young has neither yet.
            if not re.search("Failed to connect|No available agent", done.stderr):
                break
            time.sleep(2)
        return done.returncode, done.stdout + done.stderr

    status, said = submit(
        str(ROOT / "jobs" / "first.toml"),
        f"model.name={home / 'base'}",
        f"data.train={home / 'pairs.jsonl'}",
        f"data.eval={home / 'pairs.jsonl'}",
        f"output_dir={home / 'runs' / 'first'}",
        "cluster.num_workers=1",
        "bf16=false",
        "max_steps=2",
        "logging_steps=1",
        "report_to=wandb",
    )
    assert status == 0, said
    assert f"run first: 2 steps on 1 worker(s), in {home / 'runs' / 'first'}" in said
    assert "step 1/2  loss" in said
    assert "step 2/2  eval_loss" in said
    assert "trained 2 steps" in said
    assert "\u2501" not in said  # the bar of a terminal
    # The job's variables reached the worker: without WANDB_MODE wandb asks for a key, and ends the run.
    assert list((home / "runs/first/wandb").glob("offline-run-*"))
    status, said = submit(str(home / "absent.toml"))
    assert status == 1
    assert "exit code 2" in said
    assert "absent.toml" in said


def test_a_job_that_fails_ends_with_a_status_that_says_so(ray_cluster: None, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "absent.toml"],
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "absent.toml" in done.stderr


def test_the_quickstart_serves_the_scores_it_computes(
    ray_cluster: None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = quickstart.main(["--model", str(home / "base"), "--out", str(home / "out"), "--pairs", "80"])
    assert len(served) == len(quickstart.ANSWERS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("+", "-"))]
    assert [line[0] for line in lines] == [line[1] for line in lines]


def test_a_service_beside_actors_takes_a_published_name_s_directory_and_is_removed(
    ray_cluster: None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = publish(home / "base", home / "registry", "helpful")
    colocated.main(str(published.path.parent))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith(published.version)] == [
        published.version
    ] * 2
    with pytest.raises(PublishError, match="nowhere"):
        colocated.main(str(home / "nowhere"))
    assert "colocated" not in serve.status().applications


def test_a_trl_script_runs_with_its_import_line_changed(ray_cluster: None, home: Path) -> None:
    words = ["--model", str(home / "base"), "--data", str(home / "pairs.jsonl"), "--max-steps", "2"]
    trainer = trl_migration.main([*words, "--output-dir", str(home / "out")])
    assert trainer.state.global_step == 2
    assert {"eval_loss", "eval_accuracy"} <= set(trainer.state.log_history[-1])
    assert (home / "out" / "adapter_config.json").is_file()
