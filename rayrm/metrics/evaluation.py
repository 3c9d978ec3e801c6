"""Metrics of a scored evaluation set: exact over its comparisons, in float64, whatever the batches were.

A row weighs 1, each of its n comparisons 1/n, as in training: a pair is one comparison of weight 1. Accuracy
comes with its 95% interval and beside the accuracy of "the longer one wins", so that neither a small set nor
learned length passes for preference. Numpy only. For a training step's metrics see `step.py`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import RowIndex


def evaluate_scores(
    scores: npt.ArrayLike, index: RowIndex, *, center: float | None = None
) -> dict[str, float]:
    """Metrics of R scored rows by TRL's names where TRL has them, without the `eval_` prefix.

    With w the weight of a comparison and m its margin, all sums over comparisons:

        loss = sum w * [-log sigmoid(better - worse - m) + center * (better + worse)^2] / R

    the loss of Bradley and Terry with margins (Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2)
    and centring (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, eq. 2).

    Args:
        scores: of the index's N completions, in its order: for pairs chosen, rejected, chosen, ... `[N]`.
        center: coefficient of the centering term; None: 0.

    Returns:
        loss; accuracy (share of comparisons with better > worse: a tie is wrong) and its 95% Wilson interval
        accuracy_low, accuracy_high, for R independent rows; ties (share of equal scores); margin (mean of
        better - worse); mean_reward (over both sides of the comparisons); min_reward, max_reward;
        length_baseline_accuracy (the longer one wins, equal lengths count half); num_pairs (comparisons) and
        num_rows: the same number where every row is a pair.

    Raises:
        ValueError: no row, another number of scores than of completions, or a score that is no finite number.
    """
    scores_N = np.asarray(scores, dtype=np.float64).reshape(-1)
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
    compared = index.comparisons()
    better_C, worse_C = scores_N[compared.better], scores_N[compared.worse]
    longer_C = index.lengths[compared.better] - index.lengths[compared.worse]
    difference_C = better_C - worse_C

    def mean(values_C: npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> float:
        return float(compared.weight @ values_C) / index.num_rows

    # -log sigmoid(d) = log(1 + exp(-d)); logaddexp neither overflows nor loses small values.
    loss = mean(np.logaddexp(0.0, index.margins[compared.row] - difference_C))
    if center is not None:
        loss += center * mean((better_C + worse_C) ** 2)
    # Thirds may add up to a little more than one.
    num_correct = min(float(compared.weight @ (difference_C > 0)), index.num_rows)
    low, high = wilson_interval(num_correct, index.num_rows)
    return {
        "loss": loss,
        "accuracy": num_correct / index.num_rows,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": mean(difference_C == 0),
        "margin": mean(difference_C),
        "mean_reward": mean((better_C + worse_C) / 2),
        "min_reward": float(scores_N.min()),
        "max_reward": float(scores_N.max()),
        "length_baseline_accuracy": mean((np.sign(longer_C) + 1) / 2),
        "num_pairs": float(len(compared.row)),
        "num_rows": float(index.num_rows),
    }


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, `successes` of `n`; z = 1.96 gives 95%.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes/n: the shares q for which
    |p - q| <= z sqrt(q(1-q)/n). E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927). Unlike p ± z sqrt(p(1-p)/n) it stays within [0, 1] and has a width at 0 and 1.
    `successes` may be a sum of shares: their mean varies no more than that of n outcomes.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"`successes` ({successes}) of `n` ({n}) is no share: 0 <= successes <= n and n >= 1."
        )
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # Rounding may put a bound past the share itself at 0 and at 1.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))
