"""Several reward models served as one: their scores for a text -> one score, and how far they disagree.

A policy that is trained against one model learns what only that model likes. Members that were trained apart
disagree there, so the lowest of them, or their mean less their spread, gives such texts no reward
(https://arxiv.org/abs/2312.09244; it finds that the gain is largest where members differ in pretraining too).
A score costs as many forwards as there are members. Pure: no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrm.serve_settings import Ensemble


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
