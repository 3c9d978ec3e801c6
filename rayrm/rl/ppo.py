"""PPO's arithmetic: which tokens count, their rewards, advantages and losses. torch only, no Ray.

Proximal policy optimization (https://arxiv.org/abs/1707.06347) as RLHF uses it (https://arxiv.org/abs/2203.02155):
an action is a token, the score comes with the last one, and each token pays for leaving the reference policy.
Losses are sums over tokens: whoever calls divides once, by the tokens of all ranks.

Tensors are `[B, T]`: B completions, T tokens of the longest one; `mask` is 1 for the tokens of a completion
and 0 after its end. What stands where the mask is 0 has no part in any result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayrm.settings import Count, Fraction, NonNegativeFloat, Seed, frozen_settings

Positive = Annotated[float, Field(gt=0)]
Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks; of one rank, the tensor."""


@frozen_settings
class PPOSettings:
    """How PPO trains, under the names of TRL's `PPOConfig` and `GRPOConfig` where those have one."""

    steps: Count = 12
    """Rollouts; each is learned from `num_ppo_epochs` times."""

    prompts_per_step: Count = 32
    """Prompts of a rollout over all actors, with one completion each."""

    max_completion_length: Count = 16
    """Tokens after which a completion is cut."""

    temperature: Positive = 1.0
    """Of sampling, and of the log-probabilities that are learned from."""

    num_ppo_epochs: Count = 2
    """How often each rollout is learned from."""

    num_mini_batches: Count = 2
    """Optimizer steps for each of these."""

    learning_rate: Positive = 1e-5
    """Of the policy (AdamW, constant)."""

    value_learning_rate: Positive = 1e-3
    """Of the value head, which begins at zero and is one layer."""

    max_grad_norm: Positive = 1.0
    """The norm that a gradient is clipped to."""

    kl_coef: NonNegativeFloat = 0.05
    """What a nat of `log policy - log reference` costs, in deviations of the first rollout's scores."""

    cliprange: Positive = 0.2
    """How far the ratio of probabilities may leave 1 and still have a gradient."""

    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""

    cliprange_value: Positive = 0.2
    """How far a value may leave that of the rollout and still have a gradient."""

    gamma: Fraction = 1.0
    """Discount for each token."""

    lam: Fraction = 0.95
    """Of GAE: 0 trusts the value head, 1 the rewards."""

    num_actors: Count = 1
    """Processes that each generate and learn from their share of a step; gradients are summed over them."""

    seed: Seed = 0
    """Of the prompts' order and of sampling."""

    @model_validator(mode="after")
    def _shares_are_equal(self) -> PPOSettings:
        parts = self.num_actors * self.num_mini_batches
        if self.prompts_per_step % parts:
            raise ValueError(
                f"`prompts_per_step` ({self.prompts_per_step}) must be a multiple of `num_actors` x "
                f"`num_mini_batches` ({parts}): each actor has equally many prompts in each mini-batch. "
                f"Set it to {(self.prompts_per_step // parts + 1) * parts}."
            )
        return self


def completion_mask(tokens: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """1 up to and with a completion's first end-of-sequence token, 0 after it; all 1 where it has none.

    Told from the first EOS, not from padding, which may be the same token.
    """
    ends = torch.isin(tokens, tokens.new_tensor(list(eos_ids))).long()
    return (ends.cumsum(1) - ends == 0).float()


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token; `logits[:, t]` (`[B, T, vocabulary]`) is what it was drawn from."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of what each token was drawn from (`[B, T]`)."""
    return logits.logsumexp(-1) - (torch.softmax(logits, -1) * logits).sum(-1)


def token_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """`-kl_coef (log policy - log reference)` at each token, and besides the score (`[B]`) at the last."""
    rewards = -kl_coef * (logprobs - reference_logprobs) * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, 0 outside the mask (https://arxiv.org/abs/1506.02438, equation 16).

    `A_t = sum_k (gamma lam)^k delta_{t+k}` with `delta_t = r_t + gamma V_{t+1} - V_t`; the value after a
    completion's last token is 0, also where it was cut. Returns are `A + V`: what the values should be.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def alone(tensor: Tensor) -> Tensor:
    """`Total` of one rank."""
    return tensor


def whiten(advantages: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Mean 0 and variance 1 over the tokens of all ranks; 0 outside the mask."""
    count = total(mask.sum())
    mean = total((advantages * mask).sum()) / count
    variance = total(((advantages - mean) ** 2 * mask).sum()) / count
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask


@dataclass(frozen=True, slots=True)
class PPOLoss:
    """Sums over the tokens of the mask; `policy` and `value` have gradients.

    `approx_kl`: of `(ratio - 1) - log ratio`, an unbiased estimate (http://joschu.net/blog/kl-approx.html) of
    the divergence of the rollout's policy from this one. `clipped`, `value_clipped`: how many tokens' loss
    was the clipped one.
    """

    policy: Tensor
    value: Tensor
    approx_kl: Tensor
    clipped: Tensor
    value_clipped: Tensor
    ratio: Tensor


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    cliprange_value: float,
) -> PPOLoss:
    """The clipped surrogate and the clipped value loss; `old_*` are the rollout's.

    Policy: `max(-A ratio, -A clip(ratio, 1 - c, 1 + c))`. Value: half the larger square of `V - return` and
    `clip(V, V_old - c, V_old + c) - return`.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, near_error = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum()
        policy_clipped = ((clipped > plain) * mask).sum()
        value_clipped = ((near_error > error) * mask).sum()
        ratios = (ratio * mask).sum()
    return PPOLoss(
        policy=(torch.maximum(plain, clipped) * mask).sum(),
        value=0.5 * (torch.maximum(error, near_error) * mask).sum(),
        approx_kl=approx_kl,
        clipped=policy_clipped,
        value_clipped=value_clipped,
        ratio=ratios,
    )
