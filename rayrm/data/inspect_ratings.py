"""Ratings by attribute in a look at preference data, before a run says which attributes there are. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rayrm.data.attributes import COLUMNS
from rayrm.data.labels import ANY_LABELS, LabelRules
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.row_index import RowIndex
from rayrm.data.sources import SourceRow
from rayrm.errors import RowError

Singles = npt.NDArray[np.float32]


def readable(row: SourceRow, labels: LabelRules) -> tuple[SourceRow, str | None]:
    """The row as a run without `attributes` reads it where one with them could not, and why it could not."""
    content = row.content
    if not isinstance(content, Mapping) or all(content.get(column) is None for column in COLUMNS):
        return row, None
    try:
        parse_row(content, labels)
    except RowError as error:
        other = {key: value for key, value in content.items() if key not in COLUMNS}
        if error.reason == "bad-attributes" and parsed(replace(row, content=other), ANY_LABELS):
            return replace(row, content=other), f"{row.where}: {error}"
    return row, None


def parsed(row: SourceRow, labels: LabelRules) -> PreferenceRow | None:
    """What the row says; None where it is refused."""
    try:
        return None if isinstance(row.content, RowError) else parse_row(row.content, labels)
    except RowError:
        return None  # `tokenized_tables` keeps the reason


def in_columns(found: Singles, names: Sequence[str], wanted: Sequence[str]) -> Singles:
    """The columns `names` of ratings `[N, A]` at their places in `wanted`; NaN in what is not found."""
    placed = np.full((len(found), len(wanted)), np.nan, np.float32)
    for column, name in zip(found.T, names, strict=False):
        placed[:, wanted.index(name)] = column
    return placed


def spread(values: npt.NDArray[np.floating]) -> dict[str, float]:
    """min, mean, max; empty of no value."""
    if not len(values):
        return {}
    wide = values.astype(np.float64)
    return {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}


def by_attribute(index: RowIndex, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each attribute by which a completion is rated: how many are, min, mean, max."""
    ratings = {name: index.attributes[:, place] for place, name in enumerate(names)}
    given = {name: column[~np.isnan(column)] for name, column in ratings.items()}
    return {name: {"count": len(values), **spread(values)} for name, values in given.items() if len(values)}
