"""The losses of `model/objectives.py`, where formulas and sources stand, in float64. Numpy only."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Comparisons, RowIndex
from rayrm.objective import Objective

Floats = npt.NDArray[np.float64]


def comparison_losses(difference: Floats, compared: Comparisons, objective: Objective) -> Floats:
    """The loss of each comparison from its difference of scores, margin taken off, `[C]`."""
    share = compared.target
    if objective.label_smoothing:
        share = share + objective.label_smoothing * (1 - 2 * share)
    win, loss, both = outcome_losses(difference, objective)
    found = np.where(share == 1, win, share * win + (1 - share) * loss)
    return np.where(compared.tie, both, found)


def outcome_losses(difference: Floats, objective: Objective) -> tuple[Floats, Floats, Floats]:
    """-log P(win), -log P(loss) and -log P(tie) of each difference; without a tie model none ties."""
    # -log sigmoid(d) = log(1 + exp(-d)); logaddexp neither overflows nor loses small values.
    if objective.tie_model == "rao-kupper":
        eta = math.log(objective.tie_parameter)
        win, loss = np.logaddexp(0.0, eta - difference), np.logaddexp(0.0, eta + difference)
        return win, loss, win + loss - math.log(math.expm1(2 * eta))
    if objective.tie_model == "davidson":
        log_nu = math.log(objective.tie_parameter)
        log_z = np.logaddexp(np.logaddexp(difference / 2, -difference / 2), log_nu)
        return log_z - difference / 2, log_z + difference / 2, log_z - log_nu
    return np.logaddexp(0.0, -difference), np.logaddexp(0.0, difference), np.full_like(difference, np.inf)


def stages_loss(scores: Floats, index: RowIndex) -> tuple[float, npt.NDArray[np.bool_]]:
    """The sum of the rankings' losses, stage by stage, and which rows are rankings `[R]`.

    One pass over the rows: a ranking is a row of three or more ranked completions.
    """
    is_ranking = index.is_ranking
    total = 0.0
    for row in np.flatnonzero(is_ranking):
        places = slice(index.first[row], index.first[row + 1])
        rewards, ranks = scores[places], index.ranks[places]
        losses = []
        for reward, rank in zip(rewards, ranks, strict=True):
            worse = rewards[ranks > rank]
            if len(worse):
                winner = reward - index.margins[row]
                losses.append(np.logaddexp.reduce(np.append(worse, winner)) - winner)
        total += float(np.mean(losses))
    return total, is_ranking


def pointwise_losses(scores: Floats, ratings: Floats, objective: Objective) -> Floats:
    """The loss of each scored completion, `[V]`."""
    if objective.pointwise_loss == "bce":
        return np.logaddexp(0.0, -scores) + (1 - ratings) * scores
    return (scores - ratings) ** 2


def rating_of(scores: Floats, objective: Objective) -> Floats:
    """The score that a model's score foretells: itself, or with "bce" its sigmoid."""
    if objective.pointwise_loss != "bce":
        return scores
    return np.exp(-np.logaddexp(0.0, -scores))
