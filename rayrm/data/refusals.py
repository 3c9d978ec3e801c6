"""The refused rows of a stream: each kept in the quarantine file once, however often it is read.

A stream reads a row anew in every epoch, and again where it is begun anew; `RefusalLog` knows what stands in
the file already, by about a bit for each row of a source of which many are refused, and two bytes for each
refused row of another. Too many refused rows end the reading as they end an ingest (`quarantine.py`).
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from rayrm.data.blocks import BlockIndex
from rayrm.data.quarantine import RefusalWatch, write_quarantine

_ROWS_PER_PART = 2**16
_MOST_LISTED = 2**12
"""Numbers of two bytes that take the room of a part's bits."""


@dataclass(slots=True)
class RowNumbers:
    """A set of row numbers that may be sparse and large, in parts of 65,536 numbers.

    A part is the sorted list of its numbers, or where that is longer, a bit for each number there may be:
    so are Roaring bitmaps made (https://arxiv.org/abs/1402.6407).
    """

    _parts: dict[int, array[int] | bytearray] = field(default_factory=dict)

    def add(self, number: int) -> None:
        part, low = divmod(number, _ROWS_PER_PART)
        held = self._parts.setdefault(part, array("H"))
        if isinstance(held, array):
            place = bisect_left(held, low)
            if place < len(held) and held[place] == low:
                return
            held.insert(place, low)
            if len(held) > _MOST_LISTED:
                bits = self._parts[part] = bytearray(_ROWS_PER_PART // 8)
                for each in held:
                    bits[each >> 3] |= 1 << (each & 7)
        else:
            held[low >> 3] |= 1 << (low & 7)

    def __contains__(self, number: int) -> bool:
        part, low = divmod(number, _ROWS_PER_PART)
        held = self._parts.get(part)
        if held is None:
            return False
        if isinstance(held, array):
            place = bisect_left(held, low)
            return place < len(held) and held[place] == low
        return bool(held[low >> 3] & 1 << (low & 7))


@dataclass(slots=True)
class RefusalLog:
    """Where refused rows go. `names`: of the sources; `watch` says when refused rows are too many."""

    names: list[str]
    path: Path
    watch: RefusalWatch
    _known: dict[str, RowNumbers] | None = field(default=None, repr=False)

    def add(self, index: BlockIndex) -> None:
        """Write a block's refused rows that are not in the file yet. `DataError`: they are too many."""
        if self._known is None:
            self._known = _written(self.path)
        new = [r for r in index.refusals if r.row not in self._known.get(self.names[r.source], ())]
        if new:
            write_quarantine(self.path, self.names, new)
            for refusal in new:
                self._known.setdefault(self.names[refusal.source], RowNumbers()).add(refusal.row)
        self.watch.add(index.num_rows_of, index.refusals, index.num_held_out)

    def finish_epoch(self) -> None:
        """All rows were read once: `DataError` for a source with too many refused, or if no row is left."""
        self.watch.finish()


def _written(path: Path) -> dict[str, RowNumbers]:
    """The rows that stand in the file, by source; a line that a kill cut off is cut away."""
    known: dict[str, RowNumbers] = {}
    if not path.exists():
        return known
    with path.open("rb") as stream:
        whole = 0
        for line in stream:
            if not line.endswith(b"\n"):
                os.truncate(path, whole)  # or the next line would go on in it
                break
            whole += len(line)
            entry = json.loads(line)
            known.setdefault(entry["source"], RowNumbers()).add(entry["row"])
    return known
