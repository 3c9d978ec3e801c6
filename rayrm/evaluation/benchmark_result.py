"""What a benchmark says of a model: its own numbers, the tables behind them, and what to know beside them.

Pure: strings and numbers that can be printed, put on a page, or written as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrm.data.row_index import Floats
from rayrm.metrics.intervals import wilson_interval

Cell = str | float | int | None
Table = list[dict[str, Cell]]
"""Rows of one table, all with the same keys: its columns."""


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The numbers of one benchmark for one model.

    `metrics`: flat, by name; `score` is the one by which the benchmark ranks models, and is absent where rows
    are missing that it is made of: `notes` say which. `tables`: by title. `source`: where it is defined.
    """

    name: str
    source: str
    metrics: dict[str, float]
    tables: dict[str, Table]
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """What an evaluation record keeps under `benchmark`: JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "metrics": dict(self.metrics),
            "tables": {title: [dict(row) for row in table] for title, table in self.tables.items()},
            "notes": list(self.notes),
        }


def printed(table: Table) -> tuple[list[str], list[list[str]]]:
    """A table's titles, and its rows as text: four decimals; "-" where there is nothing."""
    titles = list(table[0]) if table else []
    return titles, [[_printed(row[title]) for title in titles] for row in table]


def accuracy_row(correct: Floats) -> dict[str, Cell]:
    """The mean of C outcomes, each right (1), wrong (0) or shared (between), with its 95% Wilson interval."""
    low, high = wilson_interval(float(correct.sum()), len(correct))
    return {"accuracy": float(correct.mean()), "low": low, "high": high, "rows": len(correct)}


def by_subset(correct: Floats, subsets: Sequence[Sequence[str]]) -> dict[str, Floats]:
    """The outcomes of each subset, by name, in the order in which subsets first appear.

    `correct`: of C entries; `subsets`: those in which each counts.
    """
    places: dict[str, list[int]] = {}
    for place, names in enumerate(subsets):
        for name in names:
            places.setdefault(name, []).append(place)
    return {name: correct[np.asarray(own)] for name, own in places.items()}


def absent(known: Sequence[str], present: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """A note that names those of the known parts that no row is of; nothing where all are there."""
    missing = [name for name in known if name not in present]
    return (
        (f"no row is of {len(missing)} of the {len(known)} {what}: {', '.join(missing)}",) if missing else ()
    )


def key_of(title: str) -> str:
    """A subset's title as a metric's name: `Precise IF` -> `precise_if`."""
    return title.lower().replace(" ", "_").replace("-", "_")


def _printed(cell: Cell) -> str:
    if cell is None or cell == "":
        return "-"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
