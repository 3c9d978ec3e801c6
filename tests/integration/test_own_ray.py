"""Without a cluster a run starts a Ray of its own, with no process in it that it has no use for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
from ray.train.torch import TorchTrainer

from rayrm.errors import ClusterError
from rayrm.own_ray import ensure_ray, trainer_class
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
WATCHERS = {"ray::PlacementGroupCleaner", "ray::DatasetManager", "ray::PreemptionWatcher"}


def titles(process: psutil.Process) -> set[str]:
    """What the processes under this one call themselves: Ray's actors by their class."""
    found = set()
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.add(" ".join(child.cmdline()).strip())
    return found


def test_a_run_of_its_own_has_a_worker_and_no_watchers(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    (tmp_path / "run.toml").write_text('[model]\nname = "base"\n[data]\ntrain = "pairs.jsonl"\n')
    words = ["output_dir=out", "bf16=false", "max_steps=60", "save_strategy=no", "cluster.num_workers=1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    seen: set[str] = set()
    with (
        (tmp_path / "said.txt").open("w") as said,
        subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "train.py"), "run.toml", *words],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        ) as run,
    ):
        watched = psutil.Process(run.pid)
        while run.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                seen |= titles(watched)
            time.sleep(0.1)
    text = (tmp_path / "said.txt").read_text()
    assert run.returncode == 0, text
    actors = {title.split(".")[0] for title in seen if title.startswith("ray::")}
    assert "ray::RayTrainWorker" in actors
    assert not actors & WATCHERS
    # Each part of the dashboard is a process; what is left of it without them tells Ray of the session only.
    assert not [title for title in seen if title.startswith("ray-dashboard-")]
    # What misses the dashboard says so every second.
    assert "State API" not in text


def test_a_cluster_keeps_what_watches_over_it(ray_cluster: None) -> None:
    ensure_ray()
    assert trainer_class() is not TorchTrainer  # the tests' own has no dashboard, as a run's own
    _internal_kv_put("webui:url", "127.0.0.1:8265", namespace="dashboard")
    try:
        assert trainer_class() is TorchTrainer
    finally:
        _internal_kv_del("webui:url", namespace="dashboard")


def test_a_ray_that_does_not_start_in_time_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits 30 seconds, which nothing sets, and raises a bare Exception."""

    def too_late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_late)
    with pytest.raises(ClusterError, match=r"timed out during startup\. .* type the same command again"):
        ensure_ray()
