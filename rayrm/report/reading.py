"""The files of a run directory as a report reads them. A killed run leaves half a line: noted, not fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Record = dict[str, Any]


def read_lines(file: Path, notes: list[str]) -> Iterator[Record]:
    """The JSON objects of a .jsonl file in order; one sentence for `notes` on lines that hold none."""
    damaged: list[int] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # what is no JSON, and what is no UTF-8
                damaged.append(number)
                continue
            if isinstance(record, dict):
                yield record
            else:
                damaged.append(number)
    if damaged:
        which = (
            f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines, the first {damaged[0]},"
        )
        notes.append(
            f"{file.name}: {which} holds no whole JSON object (a killed run leaves half a line): left out."
        )


def read_object(file: Path, notes: list[str]) -> Record | None:
    """The JSON object that is the whole file; None where it is missing, or unreadable, which is noted."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as problem:
        notes.append(f"{file.name} is no whole JSON ({problem}): left out.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{file.name} holds no JSON object: left out.")
        return None
    return value


def last_of_each_step(records: Iterator[Record]) -> tuple[list[Record], int]:
    """Records by step, and how many had no step. A resumed run logs steps again: what it redid is dropped.

    Several records of one step (a summary at the end) become one, later values over earlier ones.
    """
    kept: list[Record] = []
    stepless = 0
    for record in records:
        step = record.get("step")
        if not isinstance(step, int | float) or isinstance(step, bool) or not math.isfinite(step):
            stepless += 1
            continue
        while kept and kept[-1]["step"] > step:
            kept.pop()
        if kept and kept[-1]["step"] == step:
            kept[-1] = {**kept[-1], **record}
        else:
            kept.append(record)
    return kept, stepless


def column(records: list[Record], key: str) -> Array:
    """`[n]` values of `key`; NaN where a record has none, or one that is not finite."""
    return np.array([number(record.get(key)) for record in records], np.float64)


def number(value: Any) -> float:
    """`value` as a float; NaN for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
