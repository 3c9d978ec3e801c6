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

from rayrm.errors import DataError

if TYPE_CHECKING:
    from rayrm.data.blocks import Refusal

FILTERED = ("too-long",)
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
