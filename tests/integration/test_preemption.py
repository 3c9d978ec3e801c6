"""SIGTERM: the run saves after the step it is in and leaves; the same command then goes on bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.errors import PreemptedError
from rayrm.train.checkpoint import checkpoints
from rayrm.train.records import read_progress, read_records
from tests.integration.test_resume import assert_same_run, trainer_of
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 300
WORDS = [
    "bf16=false",
    "use_cpu=true",
    f"max_steps={NUM_STEPS}",
    "save_strategy=no",
    "logging_steps=7",
    "log_rows=true",
    "max_tokens_per_microbatch=400",
]
EX_TEMPFAIL = 75


@contextlib.contextmanager
def command(home: Path, output_dir: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`rayrm train` as a job, with a Ray of its own."""
    job = [
        sys.executable,
        str(ROOT / "jobs" / "train.py"),
        "run.toml",
        *WORDS,
        f"output_dir={output_dir}",
        *words,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (
        (home / f"{output_dir}.txt").open("w") as said,
        subprocess.Popen(job, cwd=home, env=environment, stderr=said, stdout=said, text=True) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, "the command ended before"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny(home / "base")
    write_rows(home / "pairs.jsonl", tiny_rows(60, conversational=True))
    (home / "run.toml").write_text('[model]\nname = "base"\n[data]\ntrain = "pairs.jsonl"\n')
    return home


@pytest.mark.parametrize(
    ("workers", "engine"), [(0, ""), pytest.param(2, "zero_stage=2", marks=pytest.mark.slow)]
)
def test_a_run_told_to_leave_saves_and_the_same_command_goes_on_bit_for_bit(
    home: Path, workers: int, engine: str
) -> None:
    words = [f"cluster.num_workers={workers}", "cluster.max_failures=1", *([engine] if engine else [])]
    name = f"{workers}{engine[-1:]}"
    with command(home, f"whole{name}", *words) as whole:
        assert whole.wait(300) == 0, (home / f"whole{name}.txt").read_text()

    run = home / f"run{name}"
    with command(home, run.name, *words) as process:
        wait_for(lambda: read_progress(run).get("step", 0) > 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == EX_TEMPFAIL, (home / f"{run.name}.txt").read_text()
    (saved,) = checkpoints(run)
    step = int(saved.name.partition("-")[2])
    assert 5 < step < NUM_STEPS
    (line,) = [line for line in (home / f"{run.name}.txt").read_text().splitlines() if "SIGTERM" in line]
    assert f"saved as checkpoint-{step} of {NUM_STEPS} steps" in line
    assert "same command goes on" in line
    assert read_progress(run)["finished"] is False
    assert not (run / "model.safetensors").exists()

    with command(home, run.name, *words) as process:
        assert process.wait(300) == 0, (home / f"{run.name}.txt").read_text()
    assert_same_run(run, home / f"whole{name}")
    for rank in range(max(workers, 1)):
        lines = [(home / made / f"rows-{rank}.jsonl").read_text() for made in (run.name, f"whole{name}")]
        assert lines[0] == lines[1]
        assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(1, NUM_STEPS + 1))


def test_a_run_told_to_leave_while_data_is_read_leaves_at_once_with_the_same_status(home: Path) -> None:
    run, said = home / "early", home / "early.txt"
    with command(home, run.name, "max_steps=2") as process:
        wait_for(
            lambda: said.exists() and "data.mode" in said.read_text(), process
        )  # what follows is to read
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == EX_TEMPFAIL, said.read_text()
    assert "told to leave (SIGTERM) before it trained" in said.read_text()
    assert not (run / "progress.json").exists()
    with command(home, run.name, "max_steps=2") as process:
        assert process.wait(300) == 0, said.read_text()
    assert read_progress(run)["finished"]


class Slow(torch.optim.AdamW):
    def __init__(self, params: Any, *, lr: float, seconds: float) -> None:
        super().__init__(params, lr=lr)
        self._seconds = seconds

    def step(self, closure: Any = None) -> Any:
        time.sleep(self._seconds)
        return super().step(closure)


def slow_trainer(root: Path, seconds: float) -> Any:
    root.mkdir(exist_ok=True)
    trainer = trainer_of(
        root, str(save_tiny(root / "base", seed=1)), workers=0, save_strategy="no", max_steps=200
    )
    trainer._optimizer = (Slow, {"lr": 1e-3, "seconds": seconds})
    return trainer


DRIVER = """
    import sys
    from pathlib import Path
    from tests.integration.test_preemption import slow_trainer
    slow_trainer(Path(sys.argv[1]), 1.0).train()
"""


def test_a_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: read_progress(tmp_path / "run").get("step", 0) > 0, process)
        process.send_signal(signal.SIGTERM)
        wait_for((tmp_path / "run" / ".leave").exists, process)
        process.send_signal(signal.SIGTERM)
        # Ray's own answer where a Ray is there, the system's where none is.
        assert process.wait(60) in (signal.SIGTERM, -signal.SIGTERM)
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.usefixtures("ray_cluster")
def test_in_python_an_exception_says_so_and_the_handler_is_what_it_was(tmp_path: Path) -> None:
    trainer = slow_trainer(tmp_path, 0.05)
    before = signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run"

    def tell() -> None:
        while read_progress(run).get("step", 0) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(
        PreemptedError, match=r"saved as checkpoint-\d+ of 200 steps.*resume_from_checkpoint=True"
    ):
        trainer.train()
    teller.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(checkpoints(run)) == 1
    assert not (run / ".leave").exists()
    assert all(record["step"] <= read_progress(run)["step"] for record in read_records(run))


@pytest.mark.usefixtures("ray_cluster")
def test_a_word_left_by_a_run_that_was_killed_does_not_end_the_next(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".leave").touch()
    trainer_of(tmp_path, str(save_tiny(tmp_path / "base", seed=1)), workers=0).train()
    assert read_progress(tmp_path / "run")["finished"]
