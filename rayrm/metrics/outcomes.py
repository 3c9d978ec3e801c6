"""Comparisons that have a likelier winner, as a model scored them: what accuracy, calibration and bias go by.

C comparisons, in the order of their rows. Of a pair the winner is the chosen side; a ranking gives one
comparison for each two completions of different rank; where a `target` below one half says so, the winner is
the side that is written as worse. Ties, and targets of one half, have no winner and are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Floats, Places, RowIndex

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """C comparisons; every array is `[C]`.

    `won`, `lost` float64: the scores of the winner and of the other. `won_length`, `lost_length` int64: their
    tokens, the prompt included. `weight` float64: 1/n in a row of n comparisons, so that a row weighs 1.
    `row` int64: its row's place in the set. `prompt` uint64: one number for all comparisons of one prompt.
    `group` int64: the place in `groups`, the names of the subsets or sources that rows belong to.
    """

    won: Floats
    lost: Floats
    won_length: Places
    lost_length: Places
    weight: Floats
    row: Places
    prompt: Keys
    group: Places
    groups: tuple[str, ...] = ("",)

    @property
    def margin(self) -> Floats:
        """How far the winner's score lies above the other's, `[C]`: positive is right, and zero is wrong."""
        return self.won - self.lost

    @property
    def num_rows(self) -> int:
        """Rows that have a comparison here."""
        return len(np.unique(self.row))

    def take(self, chosen: npt.ArrayLike) -> Outcomes:
        """Those at these places, or where a mask says so; the groups keep their numbers."""
        places = np.asarray(chosen)
        arrays = {one.name: getattr(self, one.name)[places] for one in fields(self) if one.name != "groups"}
        return Outcomes(**arrays, groups=self.groups)

    def of_group(self, name: str) -> Outcomes:
        """Those of the rows of one group. KeyError for a name that is none."""
        if name not in self.groups:
            raise KeyError(name)
        return self.take(self.group == self.groups.index(name))


def decided(index: RowIndex) -> tuple[Places, Places, Places, Floats]:
    """The comparisons that have a winner: row, winner, other (places among the N completions) and weight."""
    compared = index.comparisons()
    direction = compared.direction
    kept = direction != 0
    ahead = direction[kept] > 0
    better, worse = compared.better[kept], compared.worse[kept]
    won, lost = np.where(ahead, better, worse), np.where(ahead, worse, better)
    return compared.row[kept], won, lost, compared.weight[kept]


def joined(parts: Mapping[str, Outcomes]) -> Outcomes:
    """The comparisons of several sets, one set after another, as of groups that have the sets' names."""
    counts = [len(one.row) for one in parts.values()]
    num_rows = [int(one.row.max(initial=-1)) + 1 for one in parts.values()]
    begins = np.cumsum([0, *num_rows])[:-1]
    arrays = {
        one.name: np.concatenate([getattr(part, one.name) for part in parts.values()])
        for one in fields(Outcomes)
        if one.name not in ("groups", "group", "row")
    }
    rows = [one.row + begin for one, begin in zip(parts.values(), begins, strict=True)]
    return Outcomes(
        **arrays,
        row=np.concatenate(rows),
        group=np.repeat(np.arange(len(parts)), counts),
        groups=tuple(parts),
    )


def outcomes_of(
    scores: npt.ArrayLike,
    index: RowIndex,
    *,
    prompts: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> Outcomes:
    """The comparisons of R scored rows that have a winner.

    Args:
        scores: of the index's N completions, in its order, `[N]`.
        prompts: uint64 `[R]`, equal where rows have one prompt; None: each row has its own.
        groups: the group's name of each row, R of them; None: all of one.
    """
    scores_N = np.asarray(scores, np.float64)
    row, won, lost, weight = decided(index)
    prompt_R = np.arange(index.num_rows) if prompts is None else np.asarray(prompts, np.uint64)
    names, group_R = np.unique([""] * index.num_rows if groups is None else list(groups), return_inverse=True)
    return Outcomes(
        scores_N[won],
        scores_N[lost],
        index.lengths[won].astype(np.int64),
        index.lengths[lost].astype(np.int64),
        weight,
        row,
        prompt_R.astype(np.uint64)[row],
        group_R.astype(np.int64)[row],
        tuple(names.tolist()),
    )
