"""Metrics of a scored evaluation set: exact over its comparisons, in float64, whatever the batches were.

A row weighs 1, each of its n comparisons 1/n, as in training: a pair is one comparison of weight 1. Accuracy
comes with its 95% interval and beside the accuracy of "the longer one wins", so that neither a small set nor
learned length passes for preference. Numpy only. For a training step's metrics see `step.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Comparisons, Counts, Places, RowIndex
from rayrm.metrics.attributes import attribute_loss, attribute_metrics, correlation, rated_weight
from rayrm.metrics.intervals import wilson_interval
from rayrm.metrics.likelihood import (
    Floats,
    comparison_losses,
    outcome_losses,
    pointwise_losses,
    rating_of,
    stages_loss,
)
from rayrm.objective import Objective


def evaluate_scores(
    scores: npt.ArrayLike, index: RowIndex, objective: Objective | None = None
) -> dict[str, float]:
    """Metrics of R scored rows by TRL's names where TRL has them, without the `eval_` prefix.

    With w the weight of a comparison and m its margin, all sums over comparisons:

        loss = sum w * [-log sigmoid(better - worse - m) + center * (better + worse)^2] / R

    the loss of Bradley and Terry with margins (Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2)
    and centring (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, eq. 2); soft labels, ties, stages,
    scores and ratings by `model/objectives.py`.

    Args:
        scores: of the index's N completions, in its order: for pairs chosen, rejected, chosen, ... `[N]`.
            With the objective's attributes `[N, 1 + A]`: the ratings foretold beside each score.
        objective: what the model is trained on; None: the usual one.

    Returns:
        loss; accuracy (share of comparisons with better > worse: equal scores are wrong) and its 95% Wilson
        interval accuracy_low, accuracy_high, for independent rows; ties (share of equal scores); margin (mean
        of better - worse); mean_reward (over both sides of the comparisons, and scored completions);
        min_reward, max_reward; length_baseline_accuracy (the longer one wins, equal lengths count half);
        num_pairs (comparisons) and num_rows: the same number where every row is a pair.

        Accuracy, ties, margin and the baseline are of comparisons that have a likelier winner: with a
        `target` below one half that is the worse one, at one half there is none, as in a tie. They are absent
        where no comparison has one. Beside them, where there are such rows: `brier` (mean squared distance of
        the probability foretold from `target`); `num_ties` and `tie_accuracy` (share of ties where a tie is
        the likeliest outcome); with Plackett-Luce `top_accuracy` (share of rankings in which a best one
        scores above all others: equal scores are wrong); of scored completions `num_rated`, `mse` (with "bce"
        of the sigmoid) and `pearson` (correlation of scores given and foretold; absent where one of them does
        not vary); of ratings by attribute those of `attribute_metrics`.

    Raises:
        ValueError: no row, another number of scores than of completions, or a score that is no finite number.
    """
    objective = objective or Objective()
    given, foretold = np.asarray(scores, dtype=np.float64), None
    if objective.attributes and given.ndim == 2:
        given, foretold = given[:, 0], given[:, 1:]
    scores_N = given.reshape(-1)
    if len(scores_N) != len(index.lengths):
        raise ValueError(
            f"cannot evaluate {len(scores_N)} scores of {len(index.lengths)} completions: give one for each."
        )
    if not index.num_rows:
        raise ValueError("an evaluation set without rows has no metrics. Give at least one row.")
    bad = np.flatnonzero(~np.isfinite(scores_N))
    if bad.size:
        raise ValueError(
            f"the score of completion {bad[0]} ({scores_N[bad[0]]}) is no finite number; {bad.size} are not."
        )
    compared = index.comparisons(ties=objective.ties)
    rated, weight_of_rated = _rated(index)
    loss = _loss(scores_N, index, compared, rated, weight_of_rated, objective)
    by_attribute: dict[str, float] = {}
    if foretold is not None:
        loss += objective.attribute_weight * attribute_loss(foretold, index) / index.num_rows
        by_attribute = attribute_metrics(foretold, index, objective.attributes)
    return {
        "loss": loss,
        **_of_winners(scores_N, index, compared),
        **_of_labels(scores_N, index, compared, objective),
        **_of_ratings(scores_N, index, rated, weight_of_rated, objective),
        **by_attribute,
        "mean_reward": _mean_reward(scores_N, index, compared, rated, weight_of_rated),
        "min_reward": float(scores_N.min()),
        "max_reward": float(scores_N.max()),
        "num_pairs": float(len(compared.row)),
        "num_rows": float(index.num_rows),
    }


def _rated(index: RowIndex) -> tuple[Places, Floats]:
    """The places of the scored completions, and the weight of each: 1/n in a row of n."""
    rated = np.flatnonzero(~np.isnan(index.ratings))
    return rated, 1.0 / index.num_completions[index.row_of[rated]]


def _loss(
    scores: Floats,
    index: RowIndex,
    compared: Comparisons,
    rated: Places,
    rated_weight: Floats,
    objective: Objective,
) -> float:
    better, worse = scores[compared.better], scores[compared.worse]
    losses = comparison_losses(better - worse - compared.margin, compared, objective)
    total = 0.0
    if objective.listwise:
        total, is_ranking = stages_loss(scores, index)
        losses = np.where(is_ranking[compared.row], 0.0, losses)
    if objective.center is not None:
        losses = losses + objective.center * (better + worse) ** 2
    total += float(compared.weight @ losses)
    # Without a loss of their own scored completions are only measured.
    if len(rated) and objective.pointwise_loss != "none":
        of_ratings = pointwise_losses(scores[rated], index.ratings[rated].astype(np.float64), objective)
        total += float(rated_weight @ of_ratings)
    return total / index.num_rows


def _of_winners(scores: Floats, index: RowIndex, compared: Comparisons) -> dict[str, float]:
    """What is said of comparisons that have a likelier winner."""
    direction = compared.direction
    weight = compared.weight * np.abs(direction)
    ahead = (scores[compared.better] - scores[compared.worse]) * direction
    longer = (index.lengths[compared.better] - index.lengths[compared.worse]) * direction
    num_rows = len(np.unique(compared.row[direction != 0]))
    if not num_rows:
        return {}
    # Where all comparisons have one, a row's weights add up to 1.
    total = float(num_rows) if (direction != 0).all() else float(weight.sum())
    # Thirds may add up to a little more than one.
    num_correct = min(float(weight @ (ahead > 0)), total)
    low, high = wilson_interval(num_correct / total * num_rows, num_rows)
    return {
        "accuracy": num_correct / total,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": float(weight @ (ahead == 0)) / total,
        "margin": float(weight @ ahead) / total,
        "length_baseline_accuracy": float(weight @ ((np.sign(longer) + 1) / 2)) / total,
    }


def _of_labels(
    scores: Floats, index: RowIndex, compared: Comparisons, objective: Objective
) -> dict[str, float]:
    """What is said of soft labels, of ties and of rankings, where there are any."""
    found: dict[str, float] = {}
    difference = scores[compared.better] - scores[compared.worse] - compared.margin
    win, loss, both = outcome_losses(difference, objective)
    if (compared.target[~compared.tie] != 1).any():
        won = compared.weight * ~compared.tie
        found["brier"] = float(won @ (np.exp(-win) - compared.target) ** 2 / won.sum())
    if compared.tie.any():
        # A tie is likeliest where it is likelier than the likelier winner.
        likeliest = both < np.minimum(win, loss)
        tied = compared.weight * compared.tie
        found |= {"num_ties": float(compared.tie.sum()), "tie_accuracy": float(tied @ likeliest / tied.sum())}
    if objective.listwise:
        is_ranking = index.is_ranking
        if is_ranking.any():
            bounds = zip(index.first[:-1][is_ranking], index.first[1:][is_ranking], strict=True)
            hits = [_top_is_best(scores[first:end], index.ranks[first:end]) for first, end in bounds]
            found["top_accuracy"] = float(np.mean(hits))
    return found


def _top_is_best(scores: Floats, ranks: Counts) -> bool:
    """Whether a best completion scores above all that are no best ones: strictly, as accuracy has it."""
    is_best = ranks == ranks.min()
    return bool(scores[is_best].max() > scores[~is_best].max(initial=-np.inf))


def _of_ratings(
    scores: Floats, index: RowIndex, rated: Places, rated_weight: Floats, objective: Objective
) -> dict[str, float]:
    """What is said of scored completions."""
    if not len(rated):
        return {}
    given = index.ratings[rated].astype(np.float64)
    foretold = rating_of(scores[rated], objective)
    error = float(rated_weight @ (foretold - given) ** 2 / rated_weight.sum())
    found = {"num_rated": float(len(rated)), "mse": error}
    if (pearson := correlation(given, foretold)) is not None:
        found["pearson"] = pearson
    return found


def _mean_reward(
    scores: Floats, index: RowIndex, compared: Comparisons, rated: Places, weight_of_rated: Floats
) -> float:
    """Over both sides of all comparisons and all scored completions, each row of one weight.

    A row that is neither compared nor scored counts by its ratings.
    """
    both = (scores[compared.better] + scores[compared.worse]) / 2
    alone = np.ones(index.num_rows)
    alone[compared.row], alone[index.row_of[rated]] = 0.0, 0.0
    by_ratings = rated_weight(index).sum(axis=1) * alone[index.row_of]
    total = compared.weight.sum() + weight_of_rated.sum() + by_ratings.sum()
    if not total:
        return float(scores.mean())
    return float((compared.weight @ both + weight_of_rated @ scores[rated] + by_ratings @ scores) / total)
