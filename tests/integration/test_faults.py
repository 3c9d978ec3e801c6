"""A node that goes away under a run: it ends by itself, as if nothing had been.

A cluster of three nodes on this machine, in a process of its own: a head where the driver and tokenizing run,
and two with one worker each, which are killed for real and replaced.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm import RewardConfig, RewardTrainer
from rayrm.train.records import read_progress
from rayrm.train.row_log import read_row_log
from tests.integration.test_resume import assert_same_run
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 60
SAVE_EVERY = 10
NODE = {"num_cpus": 1, "resources": {"place": 1}}


class Slow(torch.optim.AdamW):
    """AdamW with steps long enough for something to happen in the run."""

    def step(self, closure: Any = None) -> Any:
        time.sleep(0.2)
        return super().step(closure)


def train(root: Path, name: str) -> None:
    """A run of two workers, which find place on the two nodes only."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    RewardTrainer(
        str(root / "base"),
        RewardConfig(
            str(root / name),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=7,
            save_steps=SAVE_EVERY,
            log_rows=True,
            max_tokens_per_microbatch=400,
        ),
        train_dataset=str(root / "pairs.jsonl"),
        optimizer_cls_and_kwargs=(Slow, {"lr": 1e-3}),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1, "place": 1}),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=2)),
    ).train()


def train_and(root: Path, name: str, after_step: float, act: Callable[[], None]) -> None:
    """A run, and what happens to it after a step: in this thread, since nodes can be started in no other."""
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(train, root, name)
        while not run.done() and read_progress(root / name).get("step", 0) <= after_step:
            time.sleep(0.05)
        act()
        run.result()


def main(root: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    train(root, "whole")

    def kill() -> None:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(**NODE))

    train_and(root, "killed", 1.5 * SAVE_EVERY, kill)

    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    save_tiny(root / "base", seed=1)
    write_rows(root / "pairs.jsonl", tiny_rows(100, conversational=True))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.test_faults", str(root)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    (root / "said.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (root / "said.txt").read_text()[-5000:]
    return root


def test_a_run_that_lost_a_node_ends_by_itself_as_if_nothing_had_been(runs: Path) -> None:
    assert_same_run(runs / "killed", runs / "whole")
    assert read_row_log(runs / "killed") == read_row_log(runs / "whole")
    told = (
        r"lost worker [01].* \(loss 1 of 2 that `max_failures` allows\): the run goes on from checkpoint-\d0"
    )
    assert re.search(told, (runs / "said.txt").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
