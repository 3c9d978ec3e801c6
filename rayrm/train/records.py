"""What a run leaves to read: `metrics.jsonl`, and where it stands (`progress.json`).

Rank 0 writes, and tells the trackers (`trackers.py`) the same; the driver, and anyone else, reads. One JSON
object per logging event, key `step` and TRL's names. After a restart, records beyond the checkpoint are
dropped: each step stands in the file once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rayrm.config import RewardConfig
from rayrm.errors import writing
from rayrm.train.checkpoint import TrainState, sync_directory
from rayrm.train.loop import Record
from rayrm.train.trackers import Trackers

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"
_PROGRESS_INTERVAL_S = 0.25


class RunLog:
    """The writer of a run directory's records; does nothing on ranks where it is not `active`."""

    def __init__(
        self,
        output_dir: Path,
        config: RewardConfig,
        *,
        active: bool,
        rows_per_step: int = 0,
    ) -> None:
        self._dir = output_dir
        self._active = active
        self._rows_per_step = rows_per_step
        self._trackers = Trackers(config, output_dir)
        self._shown = 0.0
        self._began = time.time()
        self._began_at_step = 0

    def begin(self, step: int) -> None:
        """Start, or go on after `step`."""
        if not self._active:
            return
        self._began_at_step = step
        self._dir.mkdir(parents=True, exist_ok=True)
        # A run that begins anew evaluates at step 0 again, so nothing is kept then.
        before = read_records(self._dir)
        kept = [record for record in before if step and record["step"] <= step and not _is_summary(record)]
        self._trackers.begin(step, before)
        write_records(self._dir, kept)

    def write(self, record: Record) -> None:
        """Append one logging event; it must say its `step`."""
        if not self._active:
            return
        file = self._dir / METRICS
        with writing(file), file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        self._trackers.write(record)

    def sync(self) -> None:
        """On disk is what was written, before a checkpoint says so."""
        if self._active and (self._dir / METRICS).exists():
            with (self._dir / METRICS).open("a") as out:
                os.fsync(out.fileno())

    def progress(self, step: int, num_steps: int, memory_bytes: int | None = None) -> None:
        """Say where training stands, and what rank 0 holds; written a few times a second at most."""
        now = time.monotonic()
        if not self._active or (now - self._shown < _PROGRESS_INTERVAL_S and step < num_steps):
            return
        self._shown = now
        standing = {"step": step, "num_steps": num_steps, "finished": False, "memory_bytes": memory_bytes}
        self._write_progress(standing, durable=False)

    def histograms(self, step: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Tell the trackers that have pictures of it how values are spread, by name."""
        if self._active:
            self._trackers.histograms(step, values)

    def leave(self, step: int, num_steps: int) -> None:
        """Say where a run that was told to leave stands."""
        if self._active:
            self._write_progress({"step": step, "num_steps": num_steps, "finished": False})

    def summarize(self, state: TrainState) -> Record:
        """Write the summary record, with transformers' names."""
        runtime = time.time() - self._began
        steps_per_second = (state.step - self._began_at_step) / max(runtime, 1e-9)
        summary = {
            "step": state.step,
            "epoch": state.epoch,
            "train_loss": state.train_loss,
            "train_runtime": runtime,
            "train_samples_per_second": steps_per_second * self._rows_per_step,
            "train_steps_per_second": steps_per_second,
            "num_tokens": state.num_tokens,
            "num_tokens_computed": state.num_tokens_computed,
        }
        self.write(summary)
        return summary

    def finish(self, state: TrainState, num_steps: int) -> None:
        """Mark the run finished; all else that it writes is there."""
        if self._active:
            finished = {"step": state.step, "num_steps": num_steps, "finished": True}
            self._write_progress({**finished, "best_checkpoint": state.best_checkpoint})

    def close(self) -> None:
        self._trackers.close()

    def _write_progress(self, standing: dict[str, Any], *, durable: bool = True) -> None:
        file = self._dir / PROGRESS
        with writing(file):
            replace_text(file, json.dumps(standing), durable=durable)


def read_records(output_dir: Path) -> list[dict[str, Any]]:
    """The logging events of a run, in order; a last line cut off by a kill is left out."""
    file = output_dir / METRICS
    if not file.exists():
        return []
    records = []
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def write_records(output_dir: Path, records: Sequence[Record]) -> None:
    """Make these the logging events of a run."""
    replace_text(output_dir / METRICS, "".join(json.dumps(record) + "\n" for record in records))


def read_progress(output_dir: Path) -> dict[str, Any]:
    """`step`, `num_steps`, `finished`; empty before the first step."""
    file = output_dir / PROGRESS
    # A power loss may leave it without content: between its ends it is not synced.
    text = file.read_text() if file.exists() else ""
    return dict(json.loads(text)) if text else {}


def _is_summary(record: dict[str, Any]) -> bool:
    return "train_runtime" in record


def replace_text(file: Path, text: str, *, durable: bool = True) -> None:
    """Write a file whole or not at all; a power loss does not undo it where it is `durable`."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w") as out:
        out.write(text)
        if durable:
            out.flush()
            os.fsync(out.fileno())
    aside.replace(file)
    if durable:
        sync_directory(file.parent)
