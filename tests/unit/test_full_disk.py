"""A disk that takes no more ends a run with the file's name and what to type; what was whole stays whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rayrm.config import RewardConfig
from rayrm.data.blocks import Refusal
from rayrm.data.order import Cursor
from rayrm.data.quarantine import write_quarantine, write_skipped
from rayrm.errors import RunDirectoryError
from rayrm.train.records import RunLog, read_records
from rayrm.train.row_log import RowLog, read_row_log
from tests.small_disk import disk_of


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A small disk; called, it is filled to the last byte."""
    with disk_of(2**18, tmp_path / "disk") as disk:

        def fill() -> Path:
            with suppress(OSError), (disk / "filling").open("wb", 0) as out:
                while True:
                    out.write(bytes(4096))
            return disk

        yield fill


def said(file: str) -> str:
    return rf"{file}` cannot be written \(No space left on device\)\. Free space there, then start the same"


def test_metrics_and_progress(full: Callable[[], Path]) -> None:
    disk = full()
    (disk / "filling").unlink()
    log = RunLog(disk, RewardConfig(report_to="none"), active=True)
    log.begin(0)
    log.write({"step": 1, "loss": 0.5})
    full()
    with pytest.raises(RunDirectoryError, match=said("metrics.jsonl")):
        deque(log.write({"step": step, "loss": 0.5}) for step in range(2, 1000))
    with pytest.raises(RunDirectoryError, match=said("progress.json")):
        log.progress(1, 1)
    steps = [record["step"] for record in read_records(disk)]
    assert steps == list(range(1, len(steps) + 1))


def test_rows(full: Callable[[], Path]) -> None:
    disk = full()
    log = RowLog(disk, 0, 1, active=True)
    log.begin(0)
    with pytest.raises(RunDirectoryError, match=said("rows-0.jsonl")):
        log.write(1, Cursor(0, 1), ["a.jsonl:1"] * 1000, skipped=False)
    assert read_row_log(disk) == []


def test_quarantine(full: Callable[[], Path]) -> None:
    file = full() / "quarantine.jsonl"
    with pytest.raises(RunDirectoryError, match=said("quarantine.jsonl")):
        write_quarantine(file, ["a.jsonl"], [Refusal(0, 0, "empty", "", "x" * 4096)])
    with pytest.raises(RunDirectoryError, match=said("quarantine.jsonl")):
        write_skipped(file, 3, ["a.jsonl:1"] * 100)
