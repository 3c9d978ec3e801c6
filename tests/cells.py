"""Which cells of the tests' matrices are trained: a few by `make test`, every one by `make test-all`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TypeVar

Cell = TypeVar("Cell")
EVERY_CELL = os.environ.get("RAYRM_EVERY_CELL") == "1"


def cells_of(every: Iterable[Cell], few: Collection[Cell]) -> list[Cell]:
    """`every` cell where all are asked for, else the `few` that differ most, in the order of `every`."""
    cells = list(every)
    unknown = [cell for cell in few if cell not in cells]
    assert not unknown, f"no cells: {unknown}"
    return cells if EVERY_CELL else [cell for cell in cells if cell in few]
