"""What a driver raises of errors in its workers."""

from __future__ import annotations

from pathlib import Path

from ray.train import WorkerGroupError

from rayrm.errors import ConfigError
from rayrm.train.launch import training_failed
from rayrm.train.workers import cause_in_workers


def test_an_error_of_ours_is_raised_and_of_another_each_worker_s_is_told() -> None:
    ours = ConfigError("`seed` (x) is none")
    assert cause_in_workers(WorkerGroupError("cut", {0: RuntimeError("lost"), 1: ours})) is ours
    failure = WorkerGroupError("cut in the mid ... dle", {1: RuntimeError("lost"), 0: IndexError("index 1")})
    assert cause_in_workers(failure) is failure
    assert failure.__notes__ == ["worker 0: IndexError: index 1", "worker 1: RuntimeError: lost"]
    said = str(training_failed(failure, Path("runs/first"), "type the same again."))
    assert said.startswith(
        "training in runs/first failed: worker 0: IndexError: index 1; worker 1: RuntimeError"
    )


def test_without_workers_errors_the_last_line_is_told() -> None:
    said = str(training_failed(RuntimeError("first\nlast\n"), Path("runs/first"), "type the same again."))
    assert said.startswith("training in runs/first failed: last. ")
