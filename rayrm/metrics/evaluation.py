"""Metrics of a scored evaluation set: exact over its pairs, in float64, whatever the batches were.

Accuracy comes with its 95% interval and beside the accuracy of "the longer side wins", so that neither a
small set nor learned length passes for preference. Numpy only. For a training step's metrics see `step.py`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def evaluate_scores(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    chosen_lengths: npt.ArrayLike,
    rejected_lengths: npt.ArrayLike,
    margins: npt.ArrayLike | None = None,
    center: float | None = None,
) -> dict[str, float]:
    """Metrics of `pairs` scored pairs, by TRL's names where TRL has them, without the `eval_` prefix.

    loss = mean(-log sigmoid(chosen - rejected - margin)) + center * mean((chosen + rejected)^2): the loss of
    Bradley and Terry with margins (Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2) and centring
    (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, eq. 2).

    Args:
        chosen, rejected: scores, [pairs].
        chosen_lengths, rejected_lengths: tokens of each whole side, [pairs].
        margins: margin of each pair in the loss, [pairs]; None: 0.
        center: coefficient of the centering term; None: 0.

    Returns:
        loss; accuracy (share of pairs with chosen > rejected: a tie is wrong) and its 95% Wilson interval
        accuracy_low, accuracy_high; ties (share of equal scores); margin (mean of chosen - rejected);
        mean_reward, min_reward, max_reward over both sides; length_baseline_accuracy (the longer side wins,
        equal lengths count half); num_pairs.

    Raises:
        ValueError: no pair, arrays of different lengths, or a score that is no finite number.
    """
    chosen_P, rejected_P = _floats("chosen", chosen), _floats("rejected", rejected)
    margin_P = np.zeros_like(chosen_P) if margins is None else _floats("margins", margins)
    longer_P = _floats("chosen_lengths", chosen_lengths) - _floats("rejected_lengths", rejected_lengths)
    if not chosen_P.shape == rejected_P.shape == margin_P.shape == longer_P.shape:
        raise ValueError(
            f"cannot evaluate {chosen_P.size} chosen, {rejected_P.size} rejected, {margin_P.size} margins "
            f"and {longer_P.size} lengths: give one of each for every pair."
        )
    num_pairs = chosen_P.size
    if num_pairs == 0:
        raise ValueError("an evaluation set without pairs has no metrics. Give at least one pair.")
    difference_P = chosen_P - rejected_P
    # -log sigmoid(d) = log(1 + exp(-d)); logaddexp neither overflows nor loses small values.
    loss = float(np.logaddexp(0.0, margin_P - difference_P).mean())
    if center is not None:
        loss += center * float(((chosen_P + rejected_P) ** 2).mean())
    num_correct = int((difference_P > 0).sum())
    low, high = wilson_interval(num_correct, num_pairs)
    return {
        "loss": loss,
        "accuracy": num_correct / num_pairs,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": float((difference_P == 0).mean()),
        "margin": float(difference_P.mean()),
        "mean_reward": float((chosen_P.mean() + rejected_P.mean()) / 2),
        "min_reward": float(min(chosen_P.min(), rejected_P.min())),
        "max_reward": float(max(chosen_P.max(), rejected_P.max())),
        "length_baseline_accuracy": float((longer_P > 0).mean() + (longer_P == 0).mean() / 2),
        "num_pairs": float(num_pairs),
    }


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, `successes` of `n`; z = 1.96 gives 95%.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes/n: the shares q for which
    |p - q| <= z sqrt(q(1-q)/n). E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927). Unlike p ± z sqrt(p(1-p)/n) it stays within [0, 1] and has a width at 0 and 1.
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


def _floats(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"`{name}` of pair {bad[0]} ({array[bad[0]]}) is no finite number; {bad.size} are not."
        )
    return array
