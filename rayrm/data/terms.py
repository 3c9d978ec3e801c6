"""The terms of a loss that rows make: comparisons, the stages of rankings, scored and rated completions.

Pure numpy. Each row weighs 1 (or what a plan says), shared evenly by its comparisons, its stages, or its
scored completions, and once more by its ratings by attribute. What most runs lack is None: their arrays, and
their losses, are those of plain pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rayrm.data.tokenize import TokenizedRow
    from rayrm.objective import Objective

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
_PAIR = 2
_INT, _FLOAT = np.int64, np.float32


@dataclass(frozen=True, slots=True)
class Stages:
    """Q choices: the first of `members` `[Q, K]` wins against the others; places among the scores, -1: none.

    `margin`, `weight` `[Q]`; `row` `[Q]`, whose they are.
    """

    members: Indices
    margin: Floats
    weight: Floats
    row: Indices


@dataclass(frozen=True, slots=True)
class Rated:
    """V scored completions: `place` among the scores, `rating`, `weight`, `row`, each `[V]`."""

    place: Indices
    rating: Floats
    weight: Floats
    row: Indices


@dataclass(frozen=True, slots=True)
class Attributed:
    """E ratings by attribute: `place` among the scores, `column`: of which attribute, `rating`, `weight`,
    `row`, each `[E]`.

    `alone` `[E]`: the weight where the row makes no other term, so that metrics count it by its ratings.
    """

    place: Indices
    column: Indices
    rating: Floats
    weight: Floats
    alone: Floats
    row: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """C comparisons: `better`, `worse` `[C]` index into the scores; `margin`, `weight` `[C]`; `row` `[C]`,
    whose they are.

    `target` `[C]`: the probability that better wins (None: 1 each). `tie` `[C]`: neither is better (None: in
    none). `in_stages` `[C]`: its likelihood is that of the row's `stages` (None: in none).
    """

    better: Indices
    worse: Indices
    margin: Floats
    weight: Floats
    row: Indices
    target: Floats | None = None
    tie: Flags | None = None
    in_stages: Flags | None = None
    stages: Stages | None = None
    rated: Rated | None = None
    attributed: Attributed | None = None

    @property
    def term_rows(self) -> list[int]:
        """The row of each term, as its losses are ordered: comparisons, stages, scores, ratings."""
        beside = (self.stages, self.rated, self.attributed)
        parts = [self.row, *(part.row for part in beside if part is not None)]
        return [row for part in parts for row in part.tolist()]


@dataclass(slots=True)
class _Growing:
    """The columns of `Terms` while rows are read."""

    compared: list[tuple[int, int, float, float, int]] = field(default_factory=list)
    target: list[float] = field(default_factory=list)
    tie: list[bool] = field(default_factory=list)
    in_stages: list[bool] = field(default_factory=list)
    stages: list[list[int]] = field(default_factory=list)
    stage: list[tuple[float, float, int]] = field(default_factory=list)
    rated: list[tuple[int, float, float, int]] = field(default_factory=list)
    attributed: list[tuple[int, int, float, float, float, int]] = field(default_factory=list)

    def add(self, row: TokenizedRow, number: int, weight: float, first: int, objective: Objective) -> None:
        """`first`: the place of the row's first score."""
        comparisons = row.compared(ties=objective.ties)
        in_stages = objective.listwise and len(row.ranks) > _PAIR
        for i, j in comparisons:
            tie = row.ranks[i] == row.ranks[j]
            margin = 0.0 if tie else row.margin
            self.compared.append((first + i, first + j, margin, weight / len(comparisons), number))
            self.target.append(row.target)
            self.tie.append(tie)
            self.in_stages.append(in_stages)
        if in_stages:
            stages = list(_stages(row.ranks))
            for members in stages:
                self.stages.append([first + place for place in members])
                self.stage.append((row.margin, weight / len(stages), number))
        ratings = row.ratings if objective.pointwise_loss != "none" else ()
        for place, rating in enumerate(ratings):
            self.rated.append((first + place, rating, weight / len(row.ratings), number))
        if width := len(objective.attributes):
            given = [(at, rating) for at, rating in enumerate(row.attributes) if not math.isnan(rating)]
            alone = not comparisons and not ratings
            for at, rating in given:
                share = weight / len(given)
                entry = (first + at // width, at % width, rating, share, share if alone else 0.0, number)
                self.attributed.append(entry)

    def terms(self) -> Terms:
        better, worse, margin, weight, row = _columns(self.compared, _INT, _INT, _FLOAT, _FLOAT, _INT)
        return Terms(
            better=better,
            worse=worse,
            margin=margin,
            weight=weight,
            row=row,
            target=np.asarray(self.target, np.float32) if any(t != 1 for t in self.target) else None,
            tie=np.asarray(self.tie) if any(self.tie) else None,
            in_stages=np.asarray(self.in_stages) if any(self.in_stages) else None,
            stages=self._stages() if self.stages else None,
            rated=Rated(*_columns(self.rated, _INT, _FLOAT, _FLOAT, _INT)) if self.rated else None,
            attributed=Attributed(*_columns(self.attributed, _INT, _INT, _FLOAT, _FLOAT, _FLOAT, _INT))
            if self.attributed
            else None,
        )

    def _stages(self) -> Stages:
        members = np.full((len(self.stages), max(map(len, self.stages))), -1, np.int64)
        for stage, places in zip(members, self.stages, strict=True):
            stage[: len(places)] = places
        return Stages(members, *_columns(self.stage, _FLOAT, _FLOAT, _INT))


def terms_of(rows: Sequence[TokenizedRow], weights: Sequence[float], objective: Objective) -> Terms:
    """What these rows add to a loss, their scores standing row after row."""
    growing, first = _Growing(), 0
    for number, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        growing.add(row, number, weight, first, objective)
        first += len(row.lengths)
    return growing.terms()


def _stages(ranks: Sequence[int]) -> Iterator[list[int]]:
    """The choices of a ranking, best first: a completion that has worse ones, then those."""
    for place in sorted(range(len(ranks)), key=ranks.__getitem__):
        worse = [other for other, rank in enumerate(ranks) if rank > ranks[place]]
        if worse and ranks[place] >= 0:
            yield [place, *worse]


def _columns(rows: Sequence[Sequence[float]], *types: type[np.generic]) -> list[npt.NDArray[Any]]:
    """A column of each type; places are far below where float64 has gaps."""
    columns = np.asarray(rows, np.float64).reshape(-1, len(types)).T
    return [column.astype(kind) for column, kind in zip(columns, types, strict=True)]


NO_TERMS = _Growing().terms()
"""Those of texts that are only scored."""
