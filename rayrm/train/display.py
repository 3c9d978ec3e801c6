"""What a person sees while a run trains: a progress bar in a terminal, plain lines elsewhere.

It reads the run directory's records, so it is the same for a run in this process and one on a cluster.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rayrm.train.records import read_progress, read_records

_POLL_S = 0.5
_SHOWN = ("loss", "accuracy", "margin", "mse", "grad_norm", "learning_rate", "pairs_per_second")
_SHOWN_EVAL = ("loss", "accuracy", "margin", "mse", "mean_reward", "length_baseline_accuracy")


class Display:
    """Follows a run directory while the `with` block runs."""

    def __init__(self, output_dir: Path, *, bar: bool = True) -> None:
        self._dir = output_dir
        self._console = Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rayrm-display", daemon=True)
        self._seen = len(read_records(output_dir))
        self._bar = (
            Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self._console, transient=True,
            )
            if bar and self._console.is_terminal
            else None
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._refresh()
        if self._bar is not None:
            self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._refresh()

    def _refresh(self) -> None:
        standing = read_progress(self._dir)
        num_steps = standing.get("num_steps")
        if self._bar is not None and num_steps:
            self._bar.update(self._task, completed=standing["step"], total=num_steps)
        records = read_records(self._dir)
        # A restart from a checkpoint drops the records beyond it.
        self._seen = min(self._seen, len(records))
        for record in records[self._seen :]:
            self._console.print(describe(record, num_steps), highlight=False, soft_wrap=True)
        self._seen = len(records)


def describe(record: dict[str, Any], num_steps: int | None) -> str:
    """One logging event as one line."""
    place = f"step {record['step']}" + (f"/{num_steps}" if num_steps else "")
    if "train_runtime" in record:
        return f"{place}  done in {record['train_runtime']:.1f} s  mean loss {record['train_loss']:.4f}"
    prefixes = sorted(
        {key[: -len("loss")] for key in record if key.startswith("eval_") and key.endswith("loss")}
    )
    if prefixes:
        parts = [
            f"{prefix}{key} {_number(record[prefix + key])}"
            for prefix in prefixes
            for key in _SHOWN_EVAL
            if prefix + key in record
        ]
    else:
        parts = [f"{key} {_number(record[key])}" for key in _SHOWN if key in record]
    return "  ".join([place, *parts])


def _number(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
