"""What follows a crash is what would have followed without it: real kills, of a worker and of the driver."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from safetensors.torch import load_file

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import CheckpointError, RunDirectoryError
from rayrm.train.checkpoint import checkpoints
from rayrm.train.records import read_progress, read_records
from tests.numerics.ranks import tokenized
from tests.small_disk import disk_of, give_more
from tests.tiny import save_tiny, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TOLERANCE = 1e-4
NUM_STEPS = 10
SAVED = 4


class KilledOnce(torch.optim.AdamW):
    """AdamW whose process, on the last rank, is killed in the first step to find checkpoint 4, once."""

    def __init__(self, params: Any, *, lr: float, marker: str) -> None:
        super().__init__(params, lr=lr)
        self._marker = Path(marker)

    def step(self, closure: Any = None) -> Any:
        sealed = self._marker.parent / "run" / f"checkpoint-{SAVED}" / "checkpoint.json"
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if last and sealed.exists() and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base"), seed=1))


def trainer_of(
    root: Path,
    base: str,
    *,
    workers: int,
    killed: bool = False,
    max_failures: int = 0,
    auto_resume: bool = False,
    **changes: Any,
) -> RewardTrainer:
    """A run in `root/run`; unless it is to be `killed`, the mark of the kill stands there already."""
    marker = root / "killed"
    if not killed:
        root.mkdir(exist_ok=True)
        marker.touch()
    settings = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8 // max(workers, 1),
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        # Checkpoints after steps 4 and 8 fall between two logs.
        "logging_steps": 3,
        "save_steps": SAVED,
        **changes,
    }
    return RewardTrainer(
        base,
        RewardConfig(str(root / "run"), **settings),
        train_dataset=TokenizedSet.from_rows(tokenized(44)),
        processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(KilledOnce, {"lr": 1e-3, "marker": str(marker)}),
        scaling_config=ScalingConfig(num_workers=workers) if workers else None,
        auto_resume=auto_resume,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=max_failures)) if workers else None,
    )


def untimed(directory: Path) -> list[dict[str, float]]:
    """The records of a run, without what a clock measured."""
    clocked = ("per_second", "runtime", "_s")
    return [
        {key: value for key, value in record.items() if not key.endswith(clocked)}
        for record in read_records(directory)
    ]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    assert untimed(one) == untimed(two)
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def in_process(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("here")
    trainer_of(root, base, workers=0).train()
    return root / "run"


@pytest.fixture(scope="module")
def on_workers(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    trainer_of(root, base, workers=2).train()
    return root / "run"


def test_two_workers_have_the_trajectory_of_one_process(in_process: Path, on_workers: Path) -> None:
    for key in ("loss", "grad_norm", "accuracy", "num_tokens"):
        here, there = ([r[key] for r in read_records(run) if key in r] for run in (in_process, on_workers))
        assert len(here) == len(there) >= 3
        np.testing.assert_allclose(there, here, rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)


def test_a_killed_worker_changes_nothing(on_workers: Path, base: str, tmp_path: Path) -> None:
    trainer_of(tmp_path, base, workers=2, killed=True, max_failures=1).train()
    assert (tmp_path / "killed").exists()
    assert_same_run(tmp_path / "run", on_workers)


def room_of(files: Iterable[Path]) -> int:
    return sum(math.ceil(file.stat().st_size / 4096) * 4096 for file in files if file.is_file())


@pytest.mark.parametrize(("workers", "stage"), [(0, None), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_whose_model_found_no_room_only_saves_when_started_again(
    base: str, tmp_path: Path, workers: int, stage: int | None
) -> None:
    settings = {"save_steps": NUM_STEPS, "zero_stage": stage}
    trainer_of(tmp_path / "whole", base, workers=workers, **settings).train()
    whole = tmp_path / "whole" / "run"
    checkpoint = whole / f"checkpoint-{NUM_STEPS}"
    records = [file for file in whole.iterdir() if not (checkpoint / file.name).exists()]
    # The checkpoint fits, and of the model half of the weights.
    enough = room_of([*checkpoint.rglob("*"), *records]) + (whole / "model.safetensors").stat().st_size // 2
    with disk_of(enough, tmp_path / "disk") as disk:
        again = trainer_of(disk, base, workers=workers, auto_resume=True, **settings)
        with pytest.raises(CheckpointError, match=rf"could not be written.*from `{checkpoint.name}`"):
            again.train()
        assert not (disk / "run" / "model.safetensors").exists()
        assert not read_progress(disk / "run")["finished"]
        give_more(disk, 2 * enough)
        trainer_of(disk, base, workers=workers, auto_resume=True, **settings).train()
        assert read_progress(disk / "run")["finished"]
        assert_same_run(disk / "run", whole)


LEFT = """
    import json, sys, time
    from pathlib import Path
    from rayrm.train.holding import only_writer
    from rayrm.train.rank import Hosts

    run = Path(sys.argv[1])
    with only_writer(run, 0, Hosts()):
        print("in", flush=True)
        while True:
            if (run / "identity.json").exists():
                with (run / "metrics.jsonl").open("a") as out:
                    out.write(json.dumps({"step": 1, "loss": 99.0}) + "\\n")
            time.sleep(0.01)
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_begins_when_what_a_killed_one_left_has_stopped_writing(
    in_process: Path, on_workers: Path, base: str, tmp_path: Path, workers: int
) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-c", textwrap.dedent(LEFT), str(run)]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == b"in\n"

        def kill() -> None:
            # Longer than a run takes to come to its first step.
            while not (run / "metrics.jsonl").exists():
                time.sleep(0.05)
            time.sleep(20.0 if workers else 5.0)
            assert not (run / "progress.json").exists()
            left.kill()

        with ThreadPoolExecutor(1) as beside:
            killed = beside.submit(kill)
            trainer_of(tmp_path, base, workers=workers).train()
            killed.result()
    assert_same_run(run, on_workers if workers else in_process)
    assert not any(path.name.endswith(".lock") for path in run.iterdir())


@pytest.mark.slow
def test_a_zero2_run_that_failed_goes_on_when_told_to(in_process: Path, base: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)worker|died|killed"):
        trainer_of(tmp_path, base, workers=2, killed=True, zero_stage=2).train()
    assert (tmp_path / "killed").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = trainer_of(tmp_path, base, workers=2, zero_stage=2)
    with pytest.raises(RunDirectoryError, match="Pass `resume_from_checkpoint=True`"):
        again.train()
    again.train(resume_from_checkpoint=True)
    ours, whole = untimed(tmp_path / "run"), untimed(in_process)
    assert [record["step"] for record in ours] == [record["step"] for record in whole]
    for mine, other in zip(ours, whole, strict=True):
        for key in mine.keys() & {"loss", "grad_norm", "train_loss", "num_tokens"}:
            assert mine[key] == pytest.approx(other[key], rel=TOLERANCE, abs=TOLERANCE)


DRIVER = """
    import sys
    from pathlib import Path
    from tests.integration.test_resume import trainer_of
    trainer_of(Path(sys.argv[1]), sys.argv[2], workers=0, killed=True).train()
"""


@pytest.fixture(scope="module")
def cut_off(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose driver, a process of its own, was killed after checkpoint 4."""
    root = tmp_path_factory.mktemp("driver")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(root), base],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return root


def test_a_corrupt_checkpoint_is_refused_by_name(cut_off: Path, base: str) -> None:
    file = checkpoints(cut_off / "run")[-1] / "engine" / "rank-0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    try:
        with pytest.raises(CheckpointError, match=r"rank-0\.safetensors` is corrupt"):
            trainer_of(cut_off, base, workers=0).train(resume_from_checkpoint=True)
    finally:
        file.write_bytes(whole)


def test_another_run_may_not_go_on_from_it(cut_off: Path, base: str) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds another run.*seed: 42 there, 43 here"):
        trainer_of(cut_off, base, workers=0, seed=43).train(resume_from_checkpoint=True)


def test_a_killed_driver_s_run_goes_on_as_if_nothing_had_been(
    cut_off: Path, in_process: Path, base: str
) -> None:
    progress = json.loads((cut_off / "run" / "progress.json").read_text())
    assert not progress["finished"]
    # The command line's rule: it is not asked for.
    trainer_of(cut_off, base, workers=0, auto_resume=True).train()
    assert_same_run(cut_off / "run", in_process)


def test_a_finished_run_is_refused(in_process: Path, base: str) -> None:
    with pytest.raises(RunDirectoryError, match="is finished"):
        trainer_of(in_process.parent, base, workers=0).train(resume_from_checkpoint=True)


def test_a_run_that_goes_on_in_a_new_directory_keeps_the_token_budget(tmp_path: Path, base: str) -> None:
    trainer_of(tmp_path, base, workers=0, max_tokens_per_microbatch=200).train()
    on = tmp_path / "run"
    whole = on.rename(tmp_path / "whole")
    # Left to measure, it would choose thousands of tokens, and sum in another order.
    trainer_of(tmp_path, base, workers=0).train(resume_from_checkpoint=str(whole / "checkpoint-8"))
    assert json.loads((on / "identity.json").read_text())["max_tokens_per_microbatch"] == 200
    first, second = weights(whole), weights(on)
    assert all(torch.equal(first[name], second[name]) for name in first)
