"""Refused rows: kept in a file, counted by source and reason, and the decision whether they are too many.

A row above `max_length` is filtered, as TRL does, and one with an excluded prompt as was asked: neither is
held against the source. Every other reason counts as a bad row. Pure: no ray.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rayrm.data.selection import EXCLUDED
from rayrm.data.sources import place_of, row_name
from rayrm.errors import DataError, NoRowLeftError, writing

if TYPE_CHECKING:
    from rayrm.data.blocks import Refusal

QUARANTINE = "quarantine.jsonl"
FILTERED = ("too-long", EXCLUDED)
NONFINITE = "nonfinite-loss"
ROWS_TO_JUDGE = 1000
_SHOWN_REASONS = 3


def quarantine_aside(owner: object) -> Path:
    """A file in a directory that others can't read; where it holds nothing when `owner` goes, it goes too."""
    directory = Path(tempfile.mkdtemp(prefix="rayrm-refused-"))
    file = directory / QUARANTINE
    weakref.finalize(owner, _drop_where_empty, file)
    return file


def _drop_where_empty(file: Path) -> None:
    with suppress(OSError):
        if file.exists() and not file.stat().st_size:
            file.unlink()
        file.parent.rmdir()


def write_quarantine(path: Path, names: Sequence[str], refusals: Sequence[Refusal]) -> None:
    """Appends one JSON object a refused row: source, row (from 0), of a text file its line (from 1), reason,
    message, raw (its text, cut)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), _alone(path), path.open("a", encoding="utf-8") as stream:
        for refusal in refusals:
            entry = {
                **_place(names[refusal.source], refusal.row),
                "reason": refusal.reason,
                "message": refusal.message,
                "raw": refusal.raw,
            }
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def write_skipped(path: Path, step: int, rows: Sequence[str]) -> None:
    """Appends rows (by `row_name`) for which training left out a step; `raw` is not known there."""
    with writing(path), _alone(path), path.open("a", encoding="utf-8") as stream:
        for name in rows:
            source, number = place_of(name)
            message = f"{name}: the loss was not finite, and step {step} was left out"
            entry = {**_place(source, number), "reason": NONFINITE, "message": message, "raw": ""}
            stream.write(json.dumps({**entry, "step": step}, ensure_ascii=False) + "\n")


def _place(source: str, row: int) -> dict[str, str | int]:
    named = row_name(source, row)
    line = {"line": row + 1} if named == f"{source}:{row + 1}" else {}
    return {"source": source, "row": row, **line}


def replace_refusals(aside: Path, kept: Path, streamed: Sequence[str]) -> None:
    """Put the refusals of this start, `aside`, in the place of those of an earlier one, which read the same.

    Rows of skipped steps stay, and rows of `streamed` sources, which are not read again up to the cursor.
    """
    sources = set(streamed)
    lines = [line for line in _lines(kept) if _skipped_in(line) > 0 or json.loads(line)["source"] in sources]
    shutil.move(aside, kept)
    with kept.open("a", encoding="utf-8") as out:
        out.writelines(lines)


def skipped_lines(path: Path) -> list[str]:
    """The lines of `write_skipped`; one cut off by a kill is left out."""
    return [line for line in _lines(path) if _skipped_in(line) > 0]


def drop_skipped(path: Path, after_step: int) -> None:
    """Drops the lines of `write_skipped` beyond a step: a run that goes on from there does it again."""
    if not path.exists():
        return
    with _alone(path):
        lines = _lines(path)
        kept = [line for line in lines if _skipped_in(line) <= after_step]
        if len(kept) < len(lines):
            aside = path.with_name(f".{path.name}")
            aside.write_text("".join(kept), encoding="utf-8")
            aside.replace(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within the block no other process writes the file, where the file system has locks of directories.

    A stream's dispatcher adds the rows that it refuses while a rank adds or drops those that it skipped.
    """
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as stream:  # texts may hold other ends of lines
        return [line for line in stream if line.endswith("\n")]


def _skipped_in(line: str) -> int:
    """The step that left the line's row out; 0: it was refused before training."""
    entry = json.loads(line)
    return int(entry["step"]) if entry["reason"] == NONFINITE else 0


@dataclass(slots=True)
class SourceCounts:
    """What became of a source's rows so far: read, left to the split's other part, refused by reason.

    `first` holds one refusal for each reason: that which stands first among those seen.
    """

    num_rows: int = 0
    num_held_out: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, Refusal] = field(default_factory=dict)

    @property
    def num_bad(self) -> int:
        return sum(count for reason, count in self.refused.items() if reason not in FILTERED)

    def add(self, refusal: Refusal) -> None:
        self.refused[refusal.reason] += 1
        known = self.first.get(refusal.reason)
        if known is None or (refusal.source, refusal.row) < (known.source, known.row):
            self.first[refusal.reason] = refusal

    def __str__(self) -> str:
        """The counts as people read them: rows read, rows kept, refusals by reason."""
        num_kept = self.num_rows - self.num_held_out - self.refused.total()
        other = f", {self.num_held_out:,} of the other part" if self.num_held_out else ""
        refused = ", ".join(f"{reason} {count:,}" for reason, count in self.refused.most_common()) or "none"
        return f"{self.num_rows:,} rows, {num_kept:,} kept{other}; refused: {refused}"


class RefusalWatch:
    """Counts refusals by source as blocks of rows come, in any order, and ends a reading that cannot be used.

    A source is refused at once when its bad rows are more than `max_bad_row_fraction` of the rows seen of it,
    counted as 1,000 at least, and when the reading is finished by its exact share. So a bad source ends a run
    within about its first thousand rows; one whose bad rows all stand at its beginning ends it too.
    Invariants, each a test: the order of blocks changes neither counts nor examples; a source is judged by
    its own rows alone; a row that is filtered or of the other part is never held against its source.

    `sources`: what the run calls the source of each index; files of one glob or directory have one name.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[str],
        max_bad_row_fraction: float,
        quarantine_path: str | Path | None = None,
    ) -> None:
        self.counts = {source: SourceCounts() for source in sources}
        self._name = name
        self._sources = sources
        self._max_bad = max_bad_row_fraction
        self._quarantine = quarantine_path

    @property
    def total(self) -> SourceCounts:
        """The counts of all sources together."""
        whole = SourceCounts()
        for counts in self.counts.values():
            whole.num_rows += counts.num_rows
            whole.num_held_out += counts.num_held_out
            whole.refused += counts.refused
            for reason, refusal in counts.first.items():
                whole.first.setdefault(reason, refusal)
        return whole

    def add(
        self,
        num_rows: Mapping[int, int],
        refusals: Sequence[Refusal],
        num_held_out: Mapping[int, int] | None = None,
    ) -> None:
        """Count a block: its rows by source index, and the refused ones. `DataError`: enough was seen."""
        for index, count in num_rows.items():
            self.counts[self._sources[index]].num_rows += count
        for index, count in (num_held_out or {}).items():
            self.counts[self._sources[index]].num_held_out += count
        for refusal in refusals:
            self.counts[self._sources[refusal.source]].add(refusal)
        for source in dict.fromkeys(self._sources[index] for index in num_rows):
            counts = self.counts[source]
            if counts.num_bad > self._max_bad * max(counts.num_rows, ROWS_TO_JUDGE):
                self._refuse(f"{counts.num_bad:,} of {counts.num_rows:,} rows read so far", source, counts)

    def finish(self) -> None:
        """All rows were seen: `DataError` for a source above the limit, `NoRowLeftError` if none is left."""
        total = self.total
        if total.num_rows == 0:
            raise DataError(f"{self._said()} has no rows; give a source that has some")
        left = total.num_rows - total.num_held_out
        if left == 0:
            raise DataError(
                f"{self._said()} takes none of {total.num_rows:,} rows: all their prompts are in the other "
                "part of `eval_fraction`'s split; raise or lower it, or give an evaluation source of its own"
            )
        if total.refused.total() == left:
            verdict = f"all {left:,} rows of {self._said()} were refused; no row is left to use"
            raise NoRowLeftError(verdict + self._reasons(total))
        for source, counts in self.counts.items():
            if counts.num_bad > self._max_bad * counts.num_rows:
                self._refuse(f"{counts.num_bad:,} of {counts.num_rows:,} rows", source, counts)

    def lines(self) -> list[str]:
        """The counts, of all sources and, where there are several, of each."""
        each = [f"  {source}: {counts}" for source, counts in self.counts.items()]
        return [f"{self._name}: {self.total}", *(each if len(each) > 1 else [])]

    def _said(self) -> str:
        names = list(self.counts)
        if self._name in names:
            return self._name
        return f"{self._name} ({', '.join(names[:3])}{' ...' if names[3:] else ''})"

    def _refuse(self, share: str, source: str, counts: SourceCounts) -> NoReturn:
        raise DataError(
            f"{share} of {source} ({counts.num_bad / counts.num_rows:.1%}) were refused, above "
            f"`max_bad_row_fraction` ({self._max_bad:g}); correct the rows, or raise it to go on without them"
            + self._reasons(counts)
        )

    def _reasons(self, counts: SourceCounts) -> str:
        """The most common reasons with a row of each, the others in numbers, and where all rows are kept."""
        ordered = counts.refused.most_common()
        shown = [
            f"\n  {reason} x {count:,}, first: {counts.first[reason].message}"
            for reason, count in ordered[:_SHOWN_REASONS]
        ]
        if others := ordered[_SHOWN_REASONS:]:
            listed = ", ".join(f"{reason} x {count:,}" for reason, count in others)
            shown.append(f"\n  and {len(others)} more: {listed}")
        kept = "" if self._quarantine is None else f"\n  the refused rows: {self._quarantine}"
        return "".join(shown) + kept
