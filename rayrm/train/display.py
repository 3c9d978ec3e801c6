"""What a person sees while a run trains: a dashboard in a terminal, plain lines elsewhere.

It reads the run directory's records, so it is the same for a run in this process and one on a cluster. In a
terminal the logged lines scroll by above it, and it leaves them alone when it goes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rayrm.train.records import read_progress, read_records

_POLL_S = 0.5
_SHOWN = ("loss", "accuracy", "margin", "mse", "grad_norm", "learning_rate", "pairs_per_second")
_SHOWN_EVAL = ("loss", "accuracy", "margin", "mse", "mean_reward", "length_baseline_accuracy")
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 32
"""Logging events behind a line of bars."""


class Display:
    """Follows a run directory while the `with` block runs."""

    def __init__(self, output_dir: Path, *, bar: bool = True, console: Console | None = None) -> None:
        self._dir = output_dir
        self._console = console or Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rayrm-display", daemon=True)
        self._seen = len(read_records(output_dir))
        self._progress = Progress(
            TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self._console, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=None)
        self._live = (
            Live(self._progress, console=self._console, transient=True, refresh_per_second=2)
            if bar and self._console.is_terminal
            else None
        )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._refresh()
        if self._live is not None:
            self._live.stop()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._refresh()

    def _refresh(self) -> None:
        standing = read_progress(self._dir)
        num_steps = standing.get("num_steps")
        records = read_records(self._dir)
        # A restart from a checkpoint drops the records beyond it.
        self._seen = min(self._seen, len(records))
        for record in records[self._seen :]:
            self._console.print(describe(record, num_steps), highlight=False, soft_wrap=True)
        self._seen = len(records)
        if self._live is not None:
            if num_steps:
                self._progress.update(self._task, completed=standing["step"], total=num_steps)
            self._live.update(dashboard(self._dir.name, self._progress, records, standing))


def dashboard(
    name: str, progress: RenderableType, records: Sequence[Mapping[str, Any]], standing: Mapping[str, Any]
) -> Panel:
    """Where a run stands, its newest figures with their course, and what each evaluation set came to."""
    training = [record for record in records if "loss" in record]
    table = Table.grid(padding=(0, 2))
    for label, value, course in _figures(training, standing):
        table.add_row(label, value, f"[cyan]{course}[/]")
    parts: list[RenderableType] = [progress, table]
    newest: dict[str, Mapping[str, Any]] = {}
    for record in records:
        newest |= dict.fromkeys(_sets_of(record), record)
    for prefix, record in newest.items():
        said = ", ".join(
            f"{key} {_number(record[prefix + key])}" for key in _SHOWN_EVAL if prefix + key in record
        )
        parts.append(f"[bold]{prefix.rstrip('_')}[/] at step {record['step']}: {said}")
    return Panel(Group(*parts), title=name, border_style="dim")


def _figures(
    training: Sequence[Mapping[str, Any]], standing: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Of each figure its name, its newest value and its course over the last logging events."""
    found = []
    for label, key, shown in (
        ("loss", "loss", "{:.4f}"),
        ("accuracy", "accuracy", "{:.1%}"),
        ("margin", "margin", "{:+.3f}"),
        ("gradient norm", "grad_norm", "{:.3g}"),
        ("learning rate", "learning_rate", "{:.3g}"),
        ("pairs/s", "pairs_per_second", "{:,.1f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ):
        values = [record[key] for record in training if key in record]
        if values:
            found.append((label, shown.format(values[-1]), sparkline(values)))
    if training and "data_wait_s" in training[-1]:
        found.append(("waited for data", f"{training[-1]['data_wait_s']:.2f} s", ""))
    if memory := standing.get("memory_bytes"):
        found.append(("memory of rank 0", f"{memory / 2**30:.2f} GiB", ""))
    return found


def sparkline(values: Sequence[float]) -> str:
    """The last values as bars, the lowest and the highest of them at the ends of the scale."""
    kept = [value for value in values[-_TREND:] if value == value and abs(value) != float("inf")]
    if not kept:
        return ""
    low, spread = min(kept), max(kept) - min(kept)
    return "".join(_BARS[round((value - low) / spread * (len(_BARS) - 1)) if spread else 0] for value in kept)


def describe(record: Mapping[str, Any], num_steps: int | None) -> str:
    """One logging event as one line."""
    place = f"step {record['step']}" + (f"/{num_steps}" if num_steps else "")
    if "train_runtime" in record:
        return f"{place}  done in {record['train_runtime']:.1f} s  mean loss {record['train_loss']:.4f}"
    if prefixes := _sets_of(record):
        parts = [
            f"{prefix}{key} {_number(record[prefix + key])}"
            for prefix in prefixes
            for key in _SHOWN_EVAL
            if prefix + key in record
        ]
    else:
        parts = [f"{key} {_number(record[key])}" for key in _SHOWN if key in record]
    return "  ".join([place, *parts])


def _sets_of(record: Mapping[str, Any]) -> list[str]:
    """What the metrics of the evaluation sets of a record begin with; none of a record of training."""
    return sorted({key[: -len("loss")] for key in record if key.startswith("eval_") and key.endswith("loss")})


def _number(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
