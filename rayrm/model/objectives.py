"""The likelihoods of what annotators say: who wins, how surely, that nobody does, an order, a number.

Each is the negative logarithm of a probability in which rewards r stand as logarithms of strengths, and is
computed by terms that neither overflow nor vanish. Their counterparts in float64, without gradients, are in
`metrics/likelihood.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from rayrm.objective import Objective, PointwiseLoss


def comparison_losses(
    difference: torch.Tensor,
    objective: Objective,
    target: torch.Tensor | None = None,
    tie: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each comparison from its `difference` d of rewards, margin taken off, `[C]`.

    For plain pairs -log P(win) = -log sigmoid(d), Bradley and Terry's. With a `target` t `[C]`, the
    probability that better wins, the cross-entropy of Christiano et al. (https://arxiv.org/abs/1706.03741,
    section 2.2.3), with which RLAIF trains on soft labels (https://arxiv.org/abs/2309.00267):

        -t log P(win) - (1 - t) log P(loss)

    `objective.label_smoothing` e stands for labels that are wrong with that probability: t becomes
    t (1 - e) + (1 - t) e (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf; Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409, who also show how to take the bias off; here it stays).
    With a tie model a comparison in `tie` `[C]` costs -log P(tie), and P(win), P(loss) leave room for it.
    """
    if objective.tie_model == "none":
        win = -F.logsigmoid(difference)
        if target is None and objective.label_smoothing == 0:
            return win
        # log P(loss) = log P(win) - d.
        return win + (1 - _smoothed(target, objective.label_smoothing)) * difference
    win, loss, both = tie_model_losses(difference, objective)
    if target is not None or objective.label_smoothing:
        share = _smoothed(target, objective.label_smoothing)
        win = share * win + (1 - share) * loss
    return win if tie is None else torch.where(tie, both, win)


def _smoothed(target: torch.Tensor | None, smoothing: float) -> torch.Tensor | float:
    if target is None:
        return 1 - smoothing
    return target * (1 - smoothing) + (1 - target) * smoothing


def tie_model_losses(
    difference: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-log P(win), -log P(loss), -log P(tie) of each difference d, under `objective.tie_model`, each `[C]`.

    Rao and Kupper, "Ties in paired-comparison experiments: a generalization of the Bradley-Terry model",
    JASA 62 (1967), with theta > 1 and eta = log theta:

        P(win) = sigmoid(d - eta)    P(tie) = (theta^2 - 1) sigmoid(d - eta) sigmoid(-d - eta)

    Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments",
    JASA 65 (1970), with nu > 0:

        P(win) = exp(d/2) / Z    P(tie) = nu / Z    Z = exp(d/2) + exp(-d/2) + nu

    P(loss) is P(win) of -d. At d = 0 a tie has (theta - 1) / (theta + 1), nu / (2 + nu).
    """
    if objective.tie_model == "rao-kupper":
        eta = math.log(objective.tie_parameter)
        win, loss = -F.logsigmoid(difference - eta), -F.logsigmoid(-difference - eta)
        return win, loss, win + loss - math.log(math.expm1(2 * eta))
    half, log_nu = difference / 2, math.log(objective.tie_parameter)
    log_z = torch.logsumexp(torch.stack([half, -half, torch.full_like(half, log_nu)]), dim=0)
    return log_z - half, log_z + half, log_z - log_nu


def stage_losses(scores: torch.Tensor, members: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """The loss of each stage of rankings, `[Q]`: that its first member is chosen among all of them.

        -(r_1 - m) + log( exp(r_1 - m) + sum over the others of exp(r_j) )

    A ranking's stages are the choice of the best among all, of the second among the rest, and so on: Plackett
    (1975) and Luce (1959), as Zhu et al. train reward models with K-wise comparisons
    (https://arxiv.org/abs/2301.11270). A stage of two members is Bradley and Terry's with margin m.
    Completions of equal rank do not stand in each other's stages: they are not compared, as elsewhere.

    `members` `[Q, K]` index into `scores` `[N]`, -1 where there is none.
    """
    there = members >= 0
    rewards = scores[members.clamp(min=0)]
    rewards = torch.cat([rewards[:, :1] - margin[:, None], rewards[:, 1:]], dim=1)
    return torch.logsumexp(rewards.masked_fill(~there, -torch.inf), dim=1) - rewards[:, 0]


def pointwise_losses(rewards: torch.Tensor, rating: torch.Tensor, kind: PointwiseLoss) -> torch.Tensor:
    """The loss of each scored completion, `[V]`, from its reward r and its `rating` y.

    "mse": (r - y)^2, the regression of SteerLM's and HelpSteer2's reward models
    (https://arxiv.org/abs/2406.08673). "bce": -y log sigmoid(r) - (1 - y) log sigmoid(-r), for y
    from 0 to 1, as verifiers of answers are trained (https://arxiv.org/abs/2110.14168).
    """
    if kind == "bce":
        return -F.logsigmoid(rewards) + (1 - rating) * rewards
    return (rewards - rating).square()


def attribute_losses(foretold: torch.Tensor, rating: torch.Tensor) -> torch.Tensor:
    """The loss of each rating by attribute, `[E]`: (w_a . h + b_a - y)^2, the squared error of what its head
    foretells.

    HelpSteer2's and ArmoRM's reward models learn ratings so (https://arxiv.org/abs/2406.08673,
    https://arxiv.org/abs/2406.12845). All ratings of a row together weigh `objective.attribute_weight` times
    the row. The reward that comparisons are of is the heads' mean under a gate (`model/attribute_head.py`):
    their loss reaches the heads and the gate, that of the ratings the heads alone.
    """
    return (foretold - rating).square()


def rating_of(rewards: torch.Tensor, kind: PointwiseLoss) -> torch.Tensor:
    """The score that a reward foretells: itself, or with "bce" its sigmoid."""
    return torch.sigmoid(rewards) if kind == "bce" else rewards
