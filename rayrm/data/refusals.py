"""The refused rows of a stream: each kept in the quarantine file once, however often it is read.

A stream reads a row anew in every epoch, and again where it is begun anew; `RefusalLog` knows what stands in
the file already. Too many refused rows end the reading as they end an ingest (`quarantine.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rayrm.data.blocks import BlockIndex
from rayrm.data.quarantine import check_refusals, write_quarantine


@dataclass(slots=True)
class RefusalLog:
    """Where refused rows go, and how many of them are too many."""

    name: str
    names: list[str]
    path: Path
    max_bad_row_fraction: float
    _known: set[tuple[str, int]] | None = field(default=None, repr=False)
    _num_rows: int = 0

    def add(self, index: BlockIndex) -> None:
        """Write a block's refused rows that are not in the file yet."""
        if self._known is None:
            self._known = self._written()
        self._num_rows += index.num_rows
        new = [r for r in index.refusals if (self.names[r.source], r.row) not in self._known]
        if new:
            write_quarantine(self.path, self.names, new)
            self._known |= {(self.names[refusal.source], refusal.row) for refusal in new}

    def check(self) -> None:
        """Raises `DataError` where no row is left."""
        check_refusals(self.name, self._num_rows, [], self.max_bad_row_fraction, self.path)

    def _written(self) -> set[tuple[str, int]]:
        if not self.path.exists():
            return set()
        entries = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        return {(entry["source"], entry["row"]) for entry in entries}
