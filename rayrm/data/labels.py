"""What a row says of its completions beside an order: how likely it is, that they tie, or a score of each.

`LabelRules` are those of a run: which of these its loss can use. A row that it can't is refused, with the
setting that would change that. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from rayrm.data.messages import is_list, shown
from rayrm.errors import RowError
from rayrm.objective import Objective, PointwiseLoss

UNRANKED = -1
"""The rank of a completion that is compared with none."""
MOST = 3.4e38
"""The loss is float32, in which more is no finite number."""


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Whether a run learns from ties, takes rankings as wholes, how it learns from scores; its attributes."""

    ties: bool = False
    listwise: bool = False
    pointwise: PointwiseLoss = "none"
    attributes: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, objective: Objective) -> LabelRules:
        return cls(objective.ties, objective.listwise, objective.pointwise_loss, objective.attributes)

    @property
    def named(self) -> dict[str, Any]:
        """What tells these rules from the usual ones, for a cache's key: empty where they are those."""
        if self == USUAL:
            return {}
        attributes = {"attributes": list(self.attributes)} if self.attributes else {}
        return {"labels": repr(self), **attributes}


USUAL = LabelRules()
ANY_LABELS = LabelRules(ties=True, pointwise="mse")
"""Every row that some run can learn from."""


def parse_target(row: Mapping[str, Any], ranks: Sequence[int], rules: LabelRules) -> float:
    """The probability that the better of a row's comparisons wins; 1 where nothing is said.

    `RowError` (bad-target) for what is none, or where nothing is compared.
    """
    value = row.get("target")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise RowError(
            "bad-target",
            f"`target` ({shown(value)}) must be the probability that the chosen completion wins, from 0 to "
            "1; correct it, or remove it for 1",
        )
    if len(set(ranks)) < 2:
        raise RowError(
            "bad-target",
            f"`target` ({shown(value)}) is of a comparison, and the row has none that is won; remove it",
        )
    if rules.listwise and len(ranks) > 2 and value != 1:
        raise RowError(
            "bad-target",
            f"`target` ({shown(value)}) is of a comparison, and `ranking_loss` (plackett-luce) takes a "
            "ranking as a whole; remove it, or set `ranking_loss=pairwise`",
        )
    return float(value)


def parse_tie(row: Mapping[str, Any]) -> bool:
    """Whether a pair says that its sides are equally good; `RowError` (bad-tie) for no truth value."""
    value = row.get("tie")
    if value is None:
        return False
    # numpy's and Arrow's own truth values are no bool, and print as one.
    if str(value) not in ("True", "False"):
        raise RowError(
            "bad-tie", f"`tie` ({shown(value)}) must be true or false; correct it, or remove it for false"
        )
    return bool(value)


def check_tied(row: Mapping[str, Any], ranks: Sequence[int], margin: float, rules: LabelRules) -> None:
    """`RowError` (all-tied, bad-margin) for a row without better and worse that the run can't learn from."""
    if len(set(ranks)) > 1 or UNRANKED in ranks:
        return
    if not rules.ties:
        said = "`tie` is true" if parse_tie(row) else f"`ranks` ({shown(row['ranks'])}) are all equal"
        raise RowError(
            "all-tied",
            f"{said}, so nothing is compared; drop the row, or set `tie_model=davidson` to learn from ties",
        )
    if margin:
        raise RowError(
            "bad-margin", f"`margin` ({margin:g}) is of a winner, and the row is a tie; remove one of them"
        )


def scored_columns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row that scores its completions: (completion or completions, score or scores).

    The latter may be absent where the row has `attributes`. None where the row is of another form: with a
    chosen or rejected side, or with ranks.
    """
    ordered = ("chosen", "rejected", "chosen_ids", "rejected_ids", "chosen_input_ids", "ranks")
    if any(row.get(name) is not None for name in ordered):
        return None
    for given, score in (
        ("completions_ids", "scores"),
        ("completions", "scores"),
        ("completion_ids", "score"),
        ("completion", "score"),
    ):
        if row.get(given) is not None and (row.get(score) is not None or row.get("attributes") is not None):
            return given, score
    return None


def parse_scores(name: str, value: Any, count: int, rules: LabelRules) -> tuple[float, ...]:
    """The score of each of `count` completions; `RowError` (bad-score, not-pointwise)."""
    if rules.pointwise == "none":
        raise RowError(
            "not-pointwise",
            f"`{name}` ({shown(value)}): the row has scores and no better or worse; set `pointwise_loss=mse` "
            "to learn from them, or drop the row",
        )
    numbers = list(value) if is_list(value) else [value]
    if name == "scores" and (not is_list(value) or len(numbers) != count):
        raise RowError(
            "bad-score",
            f"`scores` ({shown(value)}) must be a list of {count} numbers, one a completion; correct it",
        )
    least, most = (0.0, 1.0) if rules.pointwise == "bce" else (-MOST, MOST)
    for number in numbers:
        known = not isinstance(number, bool) and isinstance(number, Real) and math.isfinite(number)
        if not known or not least <= float(number) <= most:
            said = "from 0 to 1 with `pointwise_loss` (bce)" if rules.pointwise == "bce" else "finite"
            raise RowError(
                "bad-score", f"`{name}` holds {shown(number)}; a score is a number, {said}; correct it"
            )
    return tuple(float(number) for number in numbers)


def check_unpaired(row: Mapping[str, Any], margin: float) -> None:
    """`RowError` (bad-margin, bad-target) where a row that is scored says what only comparisons have."""
    if margin:
        raise RowError(
            "bad-margin",
            f"`margin` ({margin:g}) is between two completions, and the row scores each; remove it",
        )
    if row.get("target") is not None:
        raise RowError(
            "bad-target",
            f"`target` ({shown(row['target'])}) is of a comparison, and the row scores each completion; "
            "remove it, or name the column `score`",
        )
