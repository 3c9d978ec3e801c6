"""What a row says of its completions by name: `attributes`, or of a pair `chosen_attributes` and the other's.

One number an attribute and completion, NaN where the row says none. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from rayrm.data.labels import MOST, LabelRules
from rayrm.data.messages import is_list, shown
from rayrm.errors import RowError
from rayrm.objective import ATTRIBUTE_NAME
from rayrm.settings import nearest

COLUMNS = ("attributes", "chosen_attributes", "rejected_attributes")
_OF_PAIR = COLUMNS[1:]


def parse_attributes(
    row: Mapping[str, Any], completions: Sequence[str], rules: LabelRules
) -> tuple[float, ...]:
    """The ratings of each completion by each of the run's attributes, completion after completion.

    `completions`: what the row calls them. Empty where nothing is rated, or the run asks for no attributes.
    Raises `RowError` (bad-attributes).
    """
    if not rules.attributes:
        return ()
    found = [
        number
        for column, value in _given(row, completions)
        for number in _numbers(column, value, rules.attributes)
    ]
    return () if all(map(math.isnan, found)) else tuple(found)


def check_rated(row: Mapping[str, Any], rules: LabelRules) -> None:
    """`RowError` (no-attributes) for a row that is only rated by attributes, where the run asks for none."""
    if not rules.attributes:
        raise RowError(
            "no-attributes",
            f"`attributes` ({shown(row['attributes'])}): the row has ratings and no better or worse; name "
            'those to learn from (`attributes=["helpfulness"]`), or drop the row',
        )


def names_in(rows: Iterable[Any]) -> tuple[str, ...]:
    """By which attributes some row rates a completion, in their first order, whatever else the rows are."""
    found: dict[str, None] = {}
    for row in rows:
        values: list[Any] = [row.get(column) for column in COLUMNS] if isinstance(row, Mapping) else []
        for value in values:
            for said in value if is_list(value) else [value]:
                if isinstance(said, Mapping):
                    found |= {
                        str(name): None
                        for name, number in said.items()
                        if ATTRIBUTE_NAME.fullmatch(str(name)) and _is_number(number)
                    }
    return tuple(found)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and abs(float(value)) <= MOST


def _given(row: Mapping[str, Any], completions: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """For each completion the column of its ratings, and what stands there."""
    is_pair = completions[0].startswith("chosen")
    for column in COLUMNS:
        if row.get(column) is not None and (column in _OF_PAIR) != is_pair:
            kind = "a pair" if is_pair else "such a row"
            wanted = "`chosen_attributes` and `rejected_attributes`" if is_pair else "`attributes`"
            raise RowError(
                "bad-attributes",
                f"`{column}` is not of {kind}, which has {wanted}; rename it",
            )
    if is_pair:
        yield from ((column, row.get(column)) for column in _OF_PAIR)
        return
    value = row.get("attributes")
    if completions[0] in ("completion", "completion_ids"):
        yield "attributes", value
        return
    if value is None:
        yield from (("attributes", None) for _ in completions)
        return
    if not is_list(value) or len(value) != len(completions):
        raise RowError(
            "bad-attributes",
            f"`attributes` ({shown(value)}) must be a list of {len(completions)} objects, one a completion "
            "(null where it has no rating); correct it",
        )
    yield from ((f"attributes[{place}]", one) for place, one in enumerate(value))


def _numbers(column: str, value: Any, names: Sequence[str]) -> list[float]:
    if value is None:
        return [math.nan] * len(names)
    if not isinstance(value, Mapping):
        raise RowError(
            "bad-attributes",
            f"`{column}` ({shown(value)}) must be an object of numbers by attribute, such as "
            f"{{{names[0]!r}: 3}}; convert it",
        )
    # Arrow fills what a row lacks with None.
    said = {str(name): number for name, number in value.items() if number is not None}
    for name, number in said.items():
        if name not in names:
            raise RowError(
                "bad-attributes",
                f"`{column}.{name}` is none of `attributes` ({', '.join(names)}).{nearest(name, names)} Add "
                "it there, or remove it from the row",
            )
        if not _is_number(number):
            raise RowError(
                "bad-attributes",
                f"`{column}.{name}` ({shown(number)}) must be a finite number; correct it, or remove it "
                "where there is no rating",
            )
    return [float(said.get(name, math.nan)) for name in names]
