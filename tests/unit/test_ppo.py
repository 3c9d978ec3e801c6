"""PPO: its arithmetic against sums by hand, and the learner on a tiny policy whose reward is a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError
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
from rayrm.rl.ppo_learner import Learner
from rayrm.serve.request import ScoreResult
from tests.tiny import WORDS, tiny_llama_config, tiny_tokenizer

LENGTHS = (5, 1, 3, 7)
EOS = 2


def lengths_mask(lengths: tuple[int, ...] = LENGTHS, width: int = 7) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).float()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def save_policy(directory: Path, *, chat: bool = True) -> Path:
    torch.manual_seed(0)
    # Dropout that the learner must switch off, and a way of generating that it must not follow.
    policy = AutoModelForCausalLM.from_config(tiny_llama_config(attention_dropout=0.5)).float()
    policy.generation_config = GenerationConfig(
        do_sample=True, top_k=3, repetition_penalty=1.5, eos_token_id=EOS, pad_token_id=0
    )
    policy.save_pretrained(directory)
    tiny_tokenizer(chat=chat).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("policy")))


class Reward:
    """Scores a completion's text by a function."""

    __name__ = "function"

    def __init__(self, score: Callable[[str], float] = len) -> None:
        self._score = score

    def score(self, prompts: list[Any], completions: list[Any]) -> ScoreResult:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return ScoreResult([float(self._score(text)) for text in texts], "one")

    def score_inputs(self, inputs: list[TextInput], *, truncation: None = None) -> ScoreResult:
        return self.score([entry.prompt for entry in inputs], [entry.completion for entry in inputs])


def questions(count: int) -> list[Any]:
    """Prompts of several lengths, so that there is padding on the left."""
    return [[{"role": "user", "content": " ".join(WORDS[: 1 + n % 9])}] for n in range(count)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_the_temporal_differences(gamma: float, lam: float) -> None:
    mask, rewards, values = lengths_mask(), normal(0, 4, 7), normal(1, 4, 7)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)]
        for t in range(7):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            given = expected + values[row, t].item() if t < length else 0.0
            assert returns[row, t].item() == pytest.approx(given, abs=1e-12)


def test_with_lambda_one_the_return_is_what_was_paid_from_there_on() -> None:
    mask, rewards = lengths_mask(), normal(0, 4, 7) * lengths_mask()
    _, returns = gae(rewards, normal(1, 4, 7), mask, 1.0, 1.0)
    expected = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, expected, atol=1e-12, rtol=0)


def test_a_completion_ends_with_its_first_end_of_sequence_whatever_pads_it() -> None:
    tokens = torch.tensor([[5, 6, EOS, 0, 0], [5, EOS, EOS, EOS, EOS], [5, 6, 7, 8, 9], [EOS, 5, EOS, 6, 7]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert completion_mask(tokens, [EOS]).tolist() == expected
    assert completion_mask(tokens, [EOS, 6])[0].tolist() == [1, 1, 0, 0, 0]
    assert completion_mask(tokens, []).all()


def test_the_score_stands_on_the_last_token_and_each_token_pays_for_its_divergence() -> None:
    mask, scores = lengths_mask(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    logprobs, reference = normal(0, 4, 7), normal(1, 4, 7)
    paid = token_rewards(scores, logprobs, logprobs, mask, 0.3)
    assert paid.nonzero().tolist() == [[row, length - 1] for row, length in enumerate(LENGTHS)]
    assert paid.sum(1).tolist() == scores.tolist()
    paid = token_rewards(scores, logprobs, reference, mask, 0.3)
    for row, length in enumerate(LENGTHS):
        nats = (logprobs - reference)[row, :length].sum().item()
        assert paid[row].sum().item() == pytest.approx(scores[row].item() - 0.3 * nats, abs=1e-6)
        assert not paid[row, length:].any()


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_tokens_that_count() -> None:
    mask = lengths_mask()
    white = whiten(normal(0, 4, 7) * 5 + 3, mask)
    counted = white[mask.bool()]
    assert counted.mean().item() == pytest.approx(0, abs=1e-9)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert not white[~mask.bool()].any()


def loss_of(ratio: Tensor, advantages: Tensor, mask: Tensor | None = None, **other: Tensor) -> Any:
    zero = torch.zeros_like(ratio)
    given = {"values": zero, "old_values": zero, "returns": zero, **other}
    return ppo_loss(
        ratio.log(),
        zero,
        advantages,
        mask=torch.ones_like(ratio) if mask is None else mask,
        cliprange=0.2,
        cliprange_value=0.2,
        **given,
    )


def test_the_surrogate_has_no_gradient_where_it_is_clipped_and_minus_advantage_elsewhere() -> None:
    ratio = torch.tensor([[0.5, 0.5, 0.9, 1.0, 1.1, 1.5, 1.5]], requires_grad=True)
    advantages = torch.tensor([[2.0, -2.0, 2.0, -3.0, 1.0, 2.0, -2.0]])
    loss = loss_of(ratio, advantages)
    loss.policy.backward()
    # Clipped: below 0.8 where the advantage is negative, above 1.2 where it is positive.
    assert ratio.grad.tolist()[0] == pytest.approx([-2.0, 0.0, -2.0, 3.0, -1.0, 0.0, 2.0])
    surrogate = -(0.5 * 2 + 0.8 * -2 + 0.9 * 2 + 1.0 * -3 + 1.1 * 1 + 1.2 * 2 + 1.5 * -2)
    assert loss.policy.item() == pytest.approx(surrogate, abs=1e-5)
    assert loss.clipped.item() == 2
    kl = ratio.detach() - 1 - ratio.detach().log()
    assert loss.approx_kl.item() == pytest.approx(kl.sum().item(), abs=1e-5)


def test_the_value_loss_takes_the_larger_square_and_stops_beyond_its_range() -> None:
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, 0.1]])
    values = torch.tensor([[0.1, 0.5, 0.5, 0.5]], requires_grad=True)
    ones = torch.ones(1, 4)
    loss = loss_of(ones, ones, values=values, old_values=old, returns=returns)
    loss.value.backward()
    # Second: it went 0.5 towards its return, of which 0.2 count. Third and fourth went too far the wrong way.
    assert loss.value.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2 + 0.4**2), abs=1e-6)
    assert values.grad.tolist()[0] == pytest.approx([-0.9, 0.0, 1.5, 0.4])
    assert loss.value_clipped.item() == 1


def test_what_stands_after_a_completion_s_end_changes_nothing_and_gets_no_gradient() -> None:
    mask = lengths_mask()
    outside = ~mask.bool()
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def everything(noise: float) -> tuple[list[Tensor], Tensor, Tensor]:
        given = [normal(seed, 4, 7) for seed in range(5)]
        logprobs, old, reference, values, old_values = (t.masked_fill(outside, noise) for t in given)
        logprobs.requires_grad_(), values.requires_grad_()
        paid = token_rewards(scores, old, reference.masked_fill(outside, -noise), mask, 0.3)
        advantages, returns = gae(paid, old_values, mask, 0.99, 0.9)
        loss = ppo_loss(
            logprobs, old.masked_fill(outside, 0.0), whiten(advantages, mask), values, old_values, returns,
            mask, cliprange=0.2, cliprange_value=0.2,
        )  # fmt: skip
        (loss.policy + loss.value).backward()
        parts = [loss.policy, loss.value, loss.approx_kl, loss.clipped, loss.value_clipped, loss.ratio]
        return parts, logprobs.grad, values.grad

    (quiet, *_), (loud, of_logprobs, of_values) = everything(0.0), everything(7.0)
    assert [part.item() for part in quiet] == [part.item() for part in loud]
    assert not of_logprobs[outside].any()
    assert not of_values[outside].any()
    assert of_values[~outside].any()


def test_logprobs_and_entropies_are_those_of_the_distribution() -> None:
    logits, tokens = normal(0, 2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    drawn = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(token_logprobs(logits, tokens), drawn.log_prob(tokens))
    torch.testing.assert_close(token_entropy(logits), drawn.entropy())


def test_the_learner_s_probabilities_are_those_that_were_sampled_from(policy: str) -> None:
    """Across left padding, a configuration's dropout, a temperature, and the model's generation settings."""
    learner = Learner(PPOSettings(max_completion_length=12, temperature=0.7), policy, Reward())
    torch.manual_seed(1)
    generated = learner.generate(learner.policy, questions(16))
    asked = generated.tokens.shape[1] - generated.mask.shape[1]
    assert generated.attention_mask[:, 0].sum() < 16  # there is padding

    torch.manual_seed(1)
    output = learner.policy.generate(
        input_ids=generated.tokens[:, :asked],
        attention_mask=generated.attention_mask[:, :asked],
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, generated.tokens)
    drawn_from = torch.stack(output.scores, 1)
    assert torch.isfinite(drawn_from).all()  # no top-k, no top-p
    expected = token_logprobs(drawn_from, generated.completions)
    with torch.no_grad():
        found = token_logprobs(learner.evaluate(learner.policy, generated)[0], generated.completions)
    # float32, one token at a time against all at once
    torch.testing.assert_close(found * generated.mask, expected * generated.mask, atol=1e-4, rtol=0)


def test_the_first_mini_batch_starts_at_ratio_one_and_the_reference_at_no_cost(policy: str) -> None:
    settings = PPOSettings(
        prompts_per_step=16, num_mini_batches=1, num_ppo_epochs=1, learning_rate=1e-2, max_completion_length=8
    )
    learner = Learner(settings, policy, Reward())
    rows, means = learner.step(1, questions(16))
    assert means["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert means["policy/approxkl_avg"] == pytest.approx(0, abs=1e-6)
    assert means["policy/clipfrac_avg"] == means["val/clipfrac_avg"] == 0
    assert [row["nats"] for row in rows] == pytest.approx([0] * 16, abs=1e-5)
    # The first rollout's rewards are its scores less their mean, by their deviation.
    rewards = torch.tensor([row["reward"] for row in rows])
    assert rewards.mean().item() == pytest.approx(0, abs=1e-5)
    assert rewards.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    rows, means = learner.step(2, questions(16))
    assert means["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert sum(abs(row["nats"]) for row in rows) > 0.1  # the policy has moved, the reference has not
    scale = [row["score"] - row["reward"] * learner.center_scale[1] for row in rows]
    assert scale == pytest.approx([learner.center_scale[0]] * 16, abs=1e-3)


@pytest.mark.parametrize(
    ("score", "center", "scale"),
    [
        (lambda text: 0.1, 0.1, 1.0),
        (lambda text: 12345.678, 12345.678, 1.0),
        (lambda text: 1000 + 1e-4 * (len(text) % 2), 1000, 1.0),  # float32's rounding of one and the same
    ],
)
def test_a_first_rollout_of_equal_scores_sets_no_scale(
    policy: str, score: Callable[[str], float], center: float, scale: float
) -> None:
    learner = Learner(PPOSettings(prompts_per_step=16, max_completion_length=4), policy, Reward(score))
    rows, _ = learner.step(1, questions(16))
    assert learner.center_scale == pytest.approx((center, scale), abs=1e-4)
    assert [row["reward"] for row in rows] == pytest.approx([0] * 16, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 3e4, -1e6])
def test_rewards_have_deviation_one_wherever_the_scores_lie(policy: str, offset: float) -> None:
    reward = Reward(lambda text: offset + len(text))
    learner = Learner(PPOSettings(prompts_per_step=16, max_completion_length=8), policy, reward)
    rows, _ = learner.step(1, questions(16))
    rewards = torch.tensor([row["reward"] for row in rows])
    assert rewards.mean().item() == pytest.approx(0, abs=1e-5)
    assert rewards.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    lengths = torch.tensor([float(len(row["completion"][0]["content"])) for row in rows])
    assert learner.center_scale[1] == pytest.approx(lengths.std(unbiased=False).item(), rel=1e-5)


def test_a_saved_policy_generates_as_it_did_and_is_sampled_from_as_before(
    policy: str, tmp_path: Path
) -> None:
    learner = Learner(PPOSettings(max_completion_length=8), policy, Reward())
    before = learner.sample(questions(8), 2)
    learner.save(str(tmp_path))
    assert learner.sample(questions(8), 2) == before
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.top_k, saved.repetition_penalty) == (3, 1.5)


def test_several_epochs_move_the_ratio_and_count_what_is_clipped(policy: str) -> None:
    settings = PPOSettings(
        prompts_per_step=16, num_mini_batches=2, num_ppo_epochs=4, learning_rate=3e-2, max_completion_length=8
    )
    means = Learner(settings, policy, Reward()).step(1, questions(16))[1]
    assert means["policy/approxkl_avg"] > 0.01
    assert 0.05 < means["policy/clipfrac_avg"] < 1


def test_the_values_learn_what_completions_are_worth(policy: str) -> None:
    settings = PPOSettings(
        prompts_per_step=16, num_mini_batches=1, num_ppo_epochs=8, max_completion_length=4, kl_coef=0.0,
        learning_rate=1e-9, value_learning_rate=3e-2, cliprange_value=100.0,
    )  # fmt: skip
    learner = Learner(settings, policy, Reward(lambda text: 1.0))
    learner.center_scale = (0.0, 1.0)  # every return is 1, and the value head begins at 0
    losses = [learner.step(number, questions(16))[1]["loss/value_avg"] for number in range(1, 9)]
    assert losses[-1] < 0.2 * losses[0]
    rollout, _ = learner.roll_out(questions(16))
    assert rollout.values[rollout.generated.mask.bool()].mean().item() == pytest.approx(1.0, abs=0.15)


def bandit(policy: str, word: str, num_steps: int, **fields: Any) -> tuple[list[float], list[float]]:
    """Mean score and nats from the reference of each step; a reward is how often a completion has `word`."""
    settings = PPOSettings(
        prompts_per_step=128, num_mini_batches=2, num_ppo_epochs=3, max_completion_length=4, **fields
    )
    learner = Learner(settings, policy, Reward(lambda text: text.split().count(word)))
    steps = [learner.step(number, questions(128))[0] for number in range(1, num_steps + 1)]
    means = [[sum(row[key] for row in rows) / len(rows) for rows in steps] for key in ("score", "nats")]
    return means[0], means[1]


def test_ppo_finds_the_rewarded_token_and_a_dear_divergence_keeps_it_from_going_there(policy: str) -> None:
    scores, nats = bandit(policy, "cat", 25, learning_rate=5e-3, kl_coef=0.0)
    assert scores[0] < 0.1
    assert scores[-1] > 2.5  # of the 4 tokens at most
    kept_scores, kept_nats = bandit(policy, "cat", 12, learning_rate=5e-3, kl_coef=10.0)
    assert kept_nats[-1] < 0.5 * nats[11]  # sums are rounded otherwise with other threads
    assert kept_scores[-1] < 0.5 * scores[11]


def test_settings_that_give_no_equal_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`prompts_per_step` \(30\) must be a multiple .*Set it to 32"):
        PPOSettings(prompts_per_step=30, num_mini_batches=4)
    with pytest.raises(ConfigError, match=r"`temperature` \('0'\)"):
        PPOSettings(temperature="0")  # type: ignore[arg-type]
