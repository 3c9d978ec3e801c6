"""Which rows a model was trained on: each rank's `rows-<rank>.jsonl`, one object a step (`log_rows`).

Keys: `step`, `epoch` (from 0), `rows` (the names of those in this rank's micro-batches, without dummies), and
`skipped`: true where the step's update was left out. A line is written when its step is done, and is on disk
when a checkpoint is; a run that goes on drops the lines beyond its checkpoint: each step stands there once.
The lines of all ranks together are a step's rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rayrm.data.order import Cursor
from rayrm.errors import writing

FILES = "rows-*.jsonl"


class RowLog:
    """One rank's writer; where it is not `active` it only drops what is no longer so."""

    def __init__(self, output_dir: Path, rank: int, num_ranks: int, *, active: bool) -> None:
        self._dir, self._rank, self._num_ranks, self._active = output_dir, rank, num_ranks, active
        self._out: TextIO | None = None

    def begin(self, step: int) -> None:
        """Start, or go on after `step`; rank 0 does so for ranks that there are no more."""
        for file in self._dir.glob(FILES):
            rank = int(file.stem.rpartition("-")[2])
            if rank == self._rank or (self._rank == 0 and rank >= self._num_ranks):
                _keep(file, step)
        if self._active:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._out = (self._dir / f"rows-{self._rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, after: Cursor, rows: Sequence[str], *, skipped: bool) -> None:
        if self._out is None:
            return
        epoch = after.epoch if after.step else after.epoch - 1
        line = {"step": step, "epoch": epoch, "rows": rows, **({"skipped": True} if skipped else {})}
        with writing(self._out.name):
            self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._out.flush()

    def sync(self) -> None:
        """On disk is what was written, before a checkpoint says so."""
        if self._out is not None:
            os.fsync(self._out.fileno())

    def close(self) -> None:
        if self._out is not None:
            self._out.close()


def read_row_log(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of all ranks, step after step."""
    lines = [json.loads(line) for file in sorted(output_dir.glob(FILES)) for line in _lines(file)]
    return sorted(lines, key=lambda line: int(line["step"]))


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, without a last one that a kill cut off."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        yield from (line for line in lines if line.endswith("\n"))


def _keep(file: Path, last_step: int) -> None:
    kept = [line for line in _lines(file) if json.loads(line)["step"] <= last_step]
    aside = file.with_name(f".{file.name}")
    aside.write_text("".join(kept), encoding="utf-8", newline="\n")
    aside.replace(file)
