"""The refused rows of a stream: each kept in the quarantine file once, however often it is read.

A stream reads a row anew in every epoch, and again where it is begun anew; `RefusalLog` knows what stands in
the file already. Too many refused rows end the reading as they end an ingest (`quarantine.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rayrm.data.blocks import BlockIndex
from rayrm.data.quarantine import RefusalWatch, write_quarantine


@dataclass(slots=True)
class RefusalLog:
    """Where refused rows go. `names`: of the sources; `watch` says when refused rows are too many."""

    names: list[str]
    path: Path
    watch: RefusalWatch
    _known: set[tuple[str, int]] | None = field(default=None, repr=False)

    def add(self, index: BlockIndex) -> None:
        """Write a block's refused rows that are not in the file yet. `DataError`: they are too many."""
        if self._known is None:
            self._known = self._written()
        new = [r for r in index.refusals if (self.names[r.source], r.row) not in self._known]
        if new:
            write_quarantine(self.path, self.names, new)
            self._known |= {(self.names[refusal.source], refusal.row) for refusal in new}
        self.watch.add(index.num_rows_of, index.refusals, index.num_held_out)

    def finish_epoch(self) -> None:
        """All rows were read once: `DataError` for a source with too many refused, or if no row is left."""
        self.watch.finish()

    def _written(self) -> set[tuple[str, int]]:
        if not self.path.exists():
            return set()
        with self.path.open(encoding="utf-8") as stream:
            entries = [json.loads(line) for line in stream if line.endswith("\n")]
        return {(entry["source"], entry["row"]) for entry in entries}
