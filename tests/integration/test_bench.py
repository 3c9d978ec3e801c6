"""Each benchmark runs on a tiny model: its last line is its result, and what it compares computes the same.

How fast anything is, nobody asserts here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.tiny import save_tiny, tiny_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
# float32, sums of a few dozen terms in another order.
SAME = 1e-4
EVERY = {"bench", "model", "data", "rounds", "ratio", "ratio_spread", "tokens", "machine"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(64, conversational=True))
    write_rows(tmp_path / "dialogues.jsonl", tiny_rows(64, explicit_prompt=False))
    return tmp_path


def command(name: str, *words: str) -> list[str]:
    """jobs/bench/<name>.py on the tiny model of the current directory."""
    return [sys.executable, str(ROOT / "jobs" / "bench" / f"{name}.py"), "--model", "base", *words]


def run(home: Path, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run jobs/bench/<name>.py on the tiny model in `home`."""
    return subprocess.run(
        command(name, *words),
        cwd=home,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def bench(home: Path, name: str, *words: str, **environment: str) -> dict[str, Any]:
    """Run jobs/bench/<name>.py on the tiny model; its result, which its --json file holds too."""
    done = run(home, name, *words, "--json", f"{name}.json", "--threads", "1", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((home / f"{name}.json").read_text()) == result
    assert result["bench"] == name
    assert result["ratio_spread"]["low"] <= result["ratio"] <= result["ratio_spread"]["high"]
    return result


@pytest.mark.parametrize("against", ["trl", pytest.param("packed", marks=pytest.mark.slow)])
def test_train_takes_the_same_trajectory_as_what_it_is_compared_with(home: Path, against: str) -> None:
    words = ["--data", "pairs.jsonl", "--pairs", "24", "--batch", "4", "--rounds", "2", "--against", against]
    found = bench(home, "train", *words)
    assert set(found) >= EVERY | {"pairs_per_s", "max_loss_delta", "max_grad_norm_delta", "mfu"}
    assert found["max_loss_delta"] <= SAME
    assert found["max_grad_norm_delta"] <= SAME
    assert found["tokens"]["shared"] < found["tokens"]["unpadded"] <= found["tokens"]["padded"]


@pytest.mark.parametrize("data", ["pairs.jsonl", pytest.param("dialogues.jsonl", marks=pytest.mark.slow)])
def test_score_gives_the_scores_of_the_padded_forward(home: Path, data: str) -> None:
    found = bench(home, "score", "--data", data, "--groups", "6", "--group-size", "4", "--max-tokens", "200")
    assert set(found) >= EVERY | {"scores_per_s", "bound", "share_of_bound", "max_score_delta"}
    assert found["max_score_delta"] <= SAME
    tokens = found["tokens"]
    assert tokens["distinct"] < tokens["unpadded"] < tokens["padded"]
    assert tokens["batches"] > 1
    assert tokens["distinct"] <= tokens["computed"] < tokens["unpadded"]
    assert found["bound"] == pytest.approx(tokens["padded"] / tokens["distinct"])
    assert found["share_of_bound"] == pytest.approx(found["ratio"] / found["bound"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [[], ["--zero-stage", "2"]])
def test_scaling_trains_on_the_same_pairs_with_one_worker_and_with_two(home: Path, zero: list[str]) -> None:
    sizes = ["--pairs", "16", "--pairs-per-worker", "4", "--rounds", "1"]
    found = bench(home, "scaling", "--data", "pairs.jsonl", *sizes, *zero)
    assert set(found) >= EVERY | {"pairs_per_s", "collectives_s_per_step", "step_s"}
    waits = found["collectives_s_per_step"]
    assert 0 < waits["least"] <= waits["most"]
    # Two ranks share a step's pairs between them: beginnings that lie on both are computed twice.
    assert found["tokens"]["one"] <= found["tokens"]["two"] + 200


@pytest.mark.slow
def test_checkpoint_times_each_save_but_the_first_and_the_last(home: Path) -> None:
    sizes = ["--pairs", "40", "--batch", "2", "--every", "4", "--rounds", "2"]
    found = bench(home, "checkpoint", "--data", "pairs.jsonl", *sizes)
    assert set(found) >= (EVERY - {"tokens"}) | {"wait_share", "slower_beside", "write_s", "written_mib"}
    assert found["num_saves"] == 2 * (5 - 2)
    assert found["wait_share"] == pytest.approx(found["wait_s"]["median"] / found["step_s"])
    # Weights and two moments of a tiny Llama: 31,000 parameters in float32, and its files.
    assert 0.3 < found["written_mib"] < 2


@pytest.mark.slow
@pytest.mark.ray
def test_e2e_trains_as_the_bare_step_does(ray_cluster: None, home: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    sizes = ["--pairs", "44", "--batch", "2", "--rounds", "1"]
    found = bench(home, "e2e", "--data", "pairs.jsonl", *sizes, RAY_ADDRESS=address)
    assert set(found) >= (EVERY - {"tokens"}) | {"pairs_per_s", "wall_s", "trl_wall_s", "wall_ratio"}
    assert found["max_loss_delta"] <= SAME


def test_a_bench_says_what_is_wrong_with_its_sizes(home: Path) -> None:
    done = run(home, "score", "--data", "pairs.jsonl", "--groups", "1000")
    assert done.returncode == 1
    assert "--groups (1000)" in done.stderr


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_bench_that_is_killed_leaves_no_process_behind(home: Path, number: signal.Signals) -> None:
    sizes = ["--pairs", "64", "--batch", "2", "--rounds", "1000"]
    with subprocess.Popen(
        command("train", "--data", "pairs.jsonl", *sizes, "--against", "packed"),
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as benchmark:
        process = psutil.Process(benchmark.pid)
        sides: set[psutil.Process] = set()
        deadline = time.monotonic() + 200
        # The two sides, and multiprocessing's own tracker of resources.
        while len(sides) < 3 and time.monotonic() < deadline:
            sides |= set(process.children(recursive=True))
            time.sleep(0.1)
        assert len(sides) == 3
        benchmark.send_signal(number)
        assert benchmark.wait(60) != 0
    _, alive = psutil.wait_procs(sides, timeout=60)
    assert not alive
