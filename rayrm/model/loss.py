"""The Bradley-Terry loss of comparisons: the caller adds up, and divides once, by the step's row count."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry_losses(
    scores: torch.Tensor,
    better: torch.Tensor,
    worse: torch.Tensor,
    *,
    margin: torch.Tensor,
    weight: torch.Tensor,
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """The weighted loss of each comparison c, `[C]`.

        w_c * [ -log sigmoid(r_better - r_worse - m_c)  +  k * (r_better + r_worse)^2 ]

    `scores` `[N]` in float32; `better`, `worse` `[C]` index into them; `margin`, `weight` `[C]`. The first
    term is the Bradley-Terry likelihood as InstructGPT trains it (https://arxiv.org/abs/2203.02155, section
    3.5), with the margin of Llama 2 (https://arxiv.org/abs/2307.09288, equation 2); the second centers the
    rewards (https://arxiv.org/abs/2312.09244, equation 2) with `center_rewards_coefficient` k.
    """
    r_better, r_worse = scores[better], scores[worse]
    losses = -F.logsigmoid(r_better - r_worse - margin)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (r_better + r_worse).square()
    return losses * weight
