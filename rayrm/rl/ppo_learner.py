"""PPO of a language model in one process: generate, score, learn. torch and transformers, no Ray.

`Learner` is one of the ranks of examples/ppo_actor.py, and works alone as well. It holds the policy, a value
head on the policy's last hidden state and a frozen copy of the starting policy, all in float32. Dropout stays
off: the probabilities that are learned from are those that were sampled from.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rayrm.data.messages import Text, answer_to
from rayrm.rl.ppo import (
    PPOSettings,
    completion_mask,
    gae,
    ppo_loss,
    token_entropy,
    token_logprobs,
    token_rewards,
    whiten,
)

_SAMPLED_AT_ONCE = 64
_ROUNDING = 1e-6  # of scores computed in float32, relative to them: some eight of its steps


@dataclass(frozen=True, slots=True)
class Generated:
    """Completions of a batch of prompts, B of them: P prompt tokens (padded left), T completion tokens.

    `tokens`, `attention_mask`: `[B, P + T]`; `mask`: `[B, T]`, 1 to a completion's end; `ended`:
    `[B]`, whether it came to one before it was cut.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    ended: Tensor
    texts: list[Text]

    @property
    def completions(self) -> Tensor:
        """Their tokens, `[B, T]`."""
        return self.tokens[:, -self.mask.shape[1] :]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the policy that generated them thought of the tokens (`[B, T]`); `scores`: `[B]`, float64."""

    generated: Generated
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor


class Learner:
    """One of `num_actors` ranks: each has the whole model, and its share of every step.

    Args:
        policy: directory or hub name of a causal language model, with a chat template for message prompts.
        reward: anything with `RewardClient.score`; it is asked from here.
    """

    def __init__(self, settings: PPOSettings, policy: str, reward: Any, rank: int = 0) -> None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.num_actors))
        self.settings, self.reward, self.rank = settings, reward, rank
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).to(self.device).eval()
        # What the model says of generation (a top-k, a repetition penalty) would sample from another
        # distribution than the one that is learned from: only its end-of-sequence tokens hold.
        self.saved_generation = self.policy.generation_config
        ends = self.saved_generation.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.eos_ids: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        self.policy.generation_config = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings.max_completion_length,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value_head = nn.Linear(self.policy.config.get_text_config().hidden_size, 1).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.policy.parameters()), "lr": settings.learning_rate},
                {"params": list(self.value_head.parameters()), "lr": settings.value_learning_rate},
            ],
            weight_decay=0.0,
            fused=True,
        )
        self.center_scale: tuple[float, float] | None = None  # of scores, from the first rollout

    def join(self, address: str) -> None:
        """Meet the other ranks; before the first step, and only where there are others."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, init_method=address, rank=self.rank, world_size=self.settings.num_actors
        )

    def step(self, number: int, prompts: list[Text]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """One rollout of this rank's `prompts`, learned from: a row for each completion, and means.

        The means of learning are over all ranks; what the service told of its call is this rank's.
        """
        torch.manual_seed((self.settings.seed * 1_000_003 + number) * 1009 + self.rank)
        rollout, scored = self.roll_out(prompts)
        rewards = self._scaled(rollout.scores)
        mask = rollout.generated.mask
        spent = (rollout.logprobs - rollout.reference_logprobs) * mask
        columns: dict[str, Any] = {
            "prompt": prompts,
            "completion": rollout.generated.texts,
            "score": scored.scores,
            "reward": rewards.tolist(),
            "spread": scored.spread or [None] * len(prompts),
            "length": mask.sum(1).tolist(),
            "ended": rollout.generated.ended.tolist(),
            "nats": spent.sum(1).tolist(),  # sum of log policy - log reference
            "kl": ((torch.exp(-spent) - 1 + spent) * mask).sum(1).tolist(),  # sum of GRPO's estimate of it
            "entropy": (rollout.entropy * mask).sum(1).tolist(),
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows = [{"step": number, **row, "version": scored.version} for row in rows]
        call = {
            "retries": scored.retries,
            "latency_s": scored.timing.total_s,
            "truncated": len(scored.truncated),
        }
        return rows, {**call, **self.learn(rollout, rewards)}

    @torch.no_grad()
    def generate(self, model: Any, prompts: Sequence[Text]) -> Generated:
        """One completion of each prompt, sampled from `model` at the temperature and from nothing less."""
        if isinstance(prompts[0], str):
            encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        else:
            encoded = self.tokenizer.apply_chat_template(
                list(prompts),
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                padding=True,
            )
        asked, shown = encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)
        tokens = model.generate(input_ids=asked, attention_mask=shown)
        completions = tokens[:, asked.shape[1] :]
        mask = completion_mask(completions, self.eos_ids)
        ended = torch.isin(completions, completions.new_tensor(self.eos_ids)).any(1)
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True)
            for row, kept in zip(completions, mask.bool(), strict=True)
        ]
        answers = [answer_to(prompts[0], text) for text in texts]
        return Generated(tokens, torch.cat([shown, mask.to(shown.dtype)], 1), mask, ended, answers)

    def evaluate(
        self, model: Any, generated: Generated, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Logits at the temperature (`[B, T, vocabulary]`) and values (`[B, T]`) for the tokens of `rows`.

        Both are of what stood before a token: of the hidden state that it was drawn from.
        """
        length = generated.mask.shape[1]
        attention_mask = generated.attention_mask[rows]
        output = model(
            input_ids=generated.tokens[rows],
            attention_mask=attention_mask,
            # As `generate` counts them; without these a model counts padding too.
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=length + 1,
            output_hidden_states=True,
            use_cache=False,
        )
        hidden = output.hidden_states[-1][:, -length - 1 : -1].float()
        return output.logits[:, :-1].float() / self.settings.temperature, self.value_head(hidden).squeeze(-1)

    def roll_out(self, prompts: list[Text]) -> tuple[Rollout, Any]:
        """Completions with the service's answer; the policy and the reference look at them meanwhile."""
        generated = self.generate(self.policy, prompts)
        with ThreadPoolExecutor(1) as thread, torch.no_grad():
            asked = thread.submit(self.reward.score, prompts, generated.texts)
            logits, values = self.evaluate(self.policy, generated)
            logprobs, entropy = token_logprobs(logits, generated.completions), token_entropy(logits)
            logits, _ = self.evaluate(self.reference, generated)
            reference_logprobs = token_logprobs(logits, generated.completions)
            scored = asked.result()
        scores = torch.tensor(scored.scores, dtype=torch.float64, device=self.device)
        return Rollout(generated, logprobs, reference_logprobs, values, entropy, scores), scored

    def learn(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """`num_ppo_epochs` times `num_mini_batches` optimizer steps on one rollout; means over its tokens."""
        asked, mask = self.settings, rollout.generated.mask
        paid = token_rewards(rewards, rollout.logprobs, rollout.reference_logprobs, mask, asked.kl_coef)
        advantages, returns = gae(paid, rollout.values, mask, asked.gamma, asked.lam)
        advantages = whiten(advantages, mask, self._total)
        sums = torch.zeros(7, device=self.device)
        for _ in range(asked.num_ppo_epochs):
            for rows in torch.randperm(len(mask), device=self.device).chunk(asked.num_mini_batches):
                logits, values = self.evaluate(self.policy, rollout.generated, rows)
                loss = ppo_loss(
                    token_logprobs(logits, rollout.generated.completions[rows]),
                    rollout.logprobs[rows],
                    advantages[rows],
                    values,
                    rollout.values[rows],
                    returns[rows],
                    mask[rows],
                    cliprange=asked.cliprange,
                    cliprange_value=asked.cliprange_value,
                )
                # The one denominator: this mini-batch's tokens on all ranks, whose gradients are summed.
                count = self._total(mask[rows].sum())
                self._update((loss.policy + asked.vf_coef * loss.value) / count)
                parts = (loss.policy, loss.value, loss.approx_kl, loss.clipped, loss.value_clipped)
                sums += torch.stack([*(part.detach() for part in parts), loss.ratio, mask[rows].sum()])
        sums = self._total(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        names = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg")
        return dict(zip((*names, "val/clipfrac_avg", "val/ratio"), means, strict=True))

    def sample(self, prompts: list[Text], num_samples: int) -> tuple[list[list[Text]], list[list[Text]]]:
        """`num_samples` fresh completions of each prompt, of the reference and of the policy: `[P][S]`."""
        found = []
        for model in (self.reference, self.policy):
            torch.manual_seed(self.settings.seed * 1009 + self.rank)
            repeated = [prompt for prompt in prompts for _ in range(num_samples)]
            texts: list[Text] = []
            for start in range(0, len(repeated), _SAMPLED_AT_ONCE):
                texts += self.generate(model, repeated[start : start + _SAMPLED_AT_ONCE]).texts
            found.append([texts[at : at + num_samples] for at in range(0, len(texts), num_samples)])
        return found[0], found[1]

    def save(self, directory: str) -> None:
        """The policy as transformers saves it, without the value head; what is sampled stays as it was."""
        sampling = self.policy.generation_config
        self.policy.generation_config = self.saved_generation
        try:
            self.policy.save_pretrained(directory)
        finally:
            self.policy.generation_config = sampling
        self.tokenizer.save_pretrained(directory)

    def _scaled(self, scores: Tensor) -> Tensor:
        """Scores less the mean of the first rollout's, by their deviation: one fixed line for the whole run.

        So the values begin right at 0, and `kl_coef` means the same whatever a reward model's scale. Where
        the first rollout's scores are all the same but for float32's rounding, they are not divided.
        """
        scores = scores.double()
        if self.center_scale is None:
            count, total = self._total(torch.stack([torch.ones_like(scores).sum(), scores.sum()])).tolist()
            mean = total / count
            deviation = (self._total((scores - mean).square().sum()).item() / count) ** 0.5
            self.center_scale = mean, deviation if deviation > _ROUNDING * max(1.0, abs(mean)) else 1.0
        center, scale = self.center_scale
        return ((scores - center) / scale).float()

    def _update(self, loss: Tensor) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if distributed.is_initialized():
            for parameter in parameters:
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.optimizer.step()

    def _total(self, tensor: Tensor) -> Tensor:
        if distributed.is_initialized():
            distributed.all_reduce(tensor)
        return tensor
