"""Several reward models served as one: their scores for a text -> one score, and how far they disagree.

A policy that is trained against one model learns what only that model likes. Members that were trained apart
disagree there, so the lowest of them, or their mean less their spread, gives such texts no reward
(https://arxiv.org/abs/2312.09244; it finds that the gain is largest where members differ in pretraining too).
A score costs as many forwards as there are members. Pure: no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rayrm.settings import NonNegativeFloat, frozen_settings


@frozen_settings
class Ensemble:
    """Which models are asked and what becomes of their scores. ConfigError for what cannot be meant."""

    members: Annotated[list[str], Field(min_length=2)]
    """Names of models that the same service holds, at least two."""
    reduce: Literal["mean", "min", "mean-std"] = "mean"
    """`mean`; `min`, the most pessimistic member; `mean-std`, the mean less `k` standard deviations."""
    k: NonNegativeFloat = 1.0
    """How many standard deviations `mean-std` takes off."""

    def __post_init__(self) -> None:
        if blank := [name for name in self.members if not name.strip()]:
            raise ValueError(f"`members` ({self.members}): {blank[0]!r} is no name. Type a served model's.")
        if twice := sorted({name for name in self.members if self.members.count(name) > 1}):
            raise ValueError(
                f"`members` ({self.members}): {twice[0]!r} stands there twice, and a model agrees with "
                "itself. Name each model once."
            )
        if self.k != 1.0 and self.reduce != "mean-std":
            raise ValueError(
                f'`k` ({self.k:g}) is for `reduce` "mean-std", and `reduce` is "{self.reduce}". Delete `k`, '
                'or type `reduce="mean-std"`.'
            )


def combine(ensemble: Ensemble, member_scores: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Scores `[M][N]` of M members, in the order of `members`, for N texts -> (`scores`, `spread`), N each.

    `spread`: the standard deviation over the members, divided by M: they are all there are, not a draw.
    Scores of models that were not trained together have no common zero or unit: a member whose scores lie
    lower decides a `min` alone. Train members on the same pairs with the same `center_rewards_coefficient`.
    """
    scores_MN = np.asarray(member_scores, np.float64)
    assert scores_MN.ndim == 2
    assert len(scores_MN) == len(ensemble.members)
    spread = scores_MN.std(axis=0)
    if ensemble.reduce == "min":
        combined = scores_MN.min(axis=0)
    elif ensemble.reduce == "mean":
        combined = scores_MN.mean(axis=0)
    else:
        combined = scores_MN.mean(axis=0) - ensemble.k * spread
    return combined.tolist(), spread.tolist()
