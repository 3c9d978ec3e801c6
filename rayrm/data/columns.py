"""Columns that have other names than our fields: `{prompt = "question"}` reads `prompt` from `question`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rayrm.data.attributes import COLUMNS as RATED
from rayrm.data.pieces import Columns, SourceRow
from rayrm.errors import ConfigError, RowError
from rayrm.settings import nearest

_NEEDED = (
    "chosen",
    "rejected",
    "chosen_ids",
    "rejected_ids",
    "completions",
    "completions_ids",
    "ranks",
    "completion",
    "completion_ids",
    "score",
    "scores",
)
FIELDS = ("prompt", *_NEEDED, "margin", "target", "tie", *RATED, "tools", "chat_template_kwargs", "group")


def check_columns(columns: Mapping[str, Any] | None) -> Columns:
    """The mapping as it travels with a piece. Raises `ConfigError` for a field or a column that is none."""
    given = dict(columns or {})
    for field, column in given.items():
        if field not in FIELDS:
            raise ConfigError(
                f"`columns.{field}` ({column!r}): rows have no field `{field}`.{nearest(field, FIELDS)} "
                f'Write {{field = "column"}} with a field of {", ".join(FIELDS)}.'
            )
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"`columns.{field}` ({column!r}): must be the name of the column that holds `{field}`."
            )
    return tuple(sorted(given.items()))


def renamed(rows: Iterator[SourceRow], columns: Columns) -> Iterator[SourceRow]:
    """The rows with our fields' names; a row without one of the columns is refused as missing-<field>."""
    if not columns:
        yield from rows
        return
    taken = {name for pair in columns for name in pair}
    for row in rows:
        if not isinstance(row.content, Mapping):
            yield row
            continue
        refusal = _refusal(row.content, columns)
        if refusal is not None:
            line = json.dumps(row.content, default=repr).encode() if row.line is None else row.line
            yield replace(row, content=refusal, line=line)
            continue
        kept = {name: value for name, value in row.content.items() if name not in taken}
        yield replace(row, content=kept | {field: row.content[column] for field, column in columns})


def _refusal(content: Mapping[str, Any], columns: Columns) -> RowError | None:
    for field, column in columns:
        if content.get(column) is None and (column not in content or field in _NEEDED):
            said = "is null" if column in content else f"is missing (the row has {sorted(map(str, content))})"
            return RowError(
                f"missing-{field}",
                f"the column `{column}`, which `columns` names for `{field}`, {said}; correct `columns`, or "
                "add it to the row",
            )
    return None
