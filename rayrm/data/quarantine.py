"""Refused rows: kept in a file, counted by reason, and the decision whether they are too many.

A row above `max_length` is filtered, as TRL does, and is not held against the source; every other reason
counts as a bad row. Pure: no ray.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayrm.data.sources import place_of
from rayrm.errors import DataError

if TYPE_CHECKING:
    from rayrm.data.blocks import Refusal

QUARANTINE = "quarantine.jsonl"
FILTERED = ("too-long",)
NONFINITE = "nonfinite-loss"
_SHOWN_REASONS = 3


def write_quarantine(path: Path, names: Sequence[str], refusals: Sequence[Refusal]) -> None:
    """Appends one JSON object a refused row: source, row (from 0), reason, message, raw (its text, cut)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        for refusal in refusals:
            entry = {
                "source": names[refusal.source],
                "row": refusal.row,
                "reason": refusal.reason,
                "message": refusal.message,
                "raw": refusal.raw,
            }
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def write_skipped(path: Path, step: int, rows: Sequence[str]) -> None:
    """Appends rows (by `row_name`) for which training left out a step; `raw` is not known there."""
    with path.open("a", encoding="utf-8") as stream:
        for name in rows:
            source, number = place_of(name)
            message = f"{name}: the loss was not finite, and step {step} was left out"
            entry = {"source": source, "row": number, "reason": NONFINITE, "message": message, "raw": ""}
            stream.write(json.dumps({**entry, "step": step}, ensure_ascii=False) + "\n")


def skipped_lines(path: Path) -> list[str]:
    """The lines of `write_skipped`; one cut off by a kill is left out."""
    return [line for line in _lines(path) if _skipped_in(line) > 0]


def drop_skipped(path: Path, after_step: int) -> None:
    """Drops the lines of `write_skipped` beyond a step: a run that goes on from there does it again."""
    lines = _lines(path)
    kept = [line for line in lines if _skipped_in(line) <= after_step]
    if len(kept) < len(lines):
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(path)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as stream:  # texts may hold other ends of lines
        return [line for line in stream if line.endswith("\n")]


def _skipped_in(line: str) -> int:
    """The step that left the line's row out; 0: it was refused before training."""
    entry = json.loads(line)
    return int(entry["step"]) if entry["reason"] == NONFINITE else 0


def check_refusals(
    name: str,
    num_rows: int,
    refusals: Sequence[Refusal],
    max_bad_row_fraction: float,
    quarantine_path: str | Path | None,
) -> None:
    """Raises `DataError`, with the most common reasons and a row of each, if no row or too few are left."""
    if num_rows == 0:
        raise DataError(f"{name} has no rows; give a source that has some")
    bad = sum(refusal.reason not in FILTERED for refusal in refusals)
    if len(refusals) == num_rows:
        verdict = f"all {num_rows:,} rows of {name} were refused; no row is left to use"
    elif bad > max_bad_row_fraction * num_rows:
        verdict = (
            f"{bad:,} of {num_rows:,} rows of {name} ({bad / num_rows:.1%}) were refused, above "
            f"`max_bad_row_fraction` ({max_bad_row_fraction:g}); correct the rows, or raise it to go on "
            "without them"
        )
    else:
        return
    counts = Counter(refusal.reason for refusal in refusals).most_common(_SHOWN_REASONS)
    examples = {refusal.reason: refusal.message for refusal in reversed(refusals)}
    shown = "".join(f"\n  {reason} x {count:,}, first: {examples[reason]}" for reason, count in counts)
    kept = f"\n  all of them: {quarantine_path}" if quarantine_path is not None else ""
    raise DataError(verdict + shown + kept)


def one_line(name: str, num_rows: int, refusals: Sequence[Refusal]) -> str:
    """The counts as people read them: rows read, rows kept, refusals by reason."""
    counts = Counter(refusal.reason for refusal in refusals).most_common()
    refused = ", ".join(f"{reason} {count:,}" for reason, count in counts) or "none"
    return f"{name}: {num_rows:,} rows, {num_rows - len(refusals):,} kept; refused: {refused}"
