"""TRL's GRPO with the deployed reward model as its only reward, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from examples import grpo_actor
from rayrm.errors import ConfigError, RewardUnavailableError, ScoreError
from rayrm.rl.grpo import run_grpo, train_grpo
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import deploy
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_llama_config, tiny_tokenizer

QUESTIONS = [[{"role": "user", "content": f"the {word} cat?"}] for word in ("red", "blue", "green", "old")]
SHORT: dict[str, Any] = {"max_completion_length": 6, "num_generations": 2, "prompts_per_step": 2}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).float().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def reward(ray_cluster: None, reward_model: Path) -> Iterator[RewardClient]:
    yield deploy(reward_model, "grpo-test", num_cpus=0.2)
    serve.delete("grpo-test")


@pytest.mark.ray
def test_grpo_in_an_actor_trains_on_the_handle_alone(
    reward: RewardClient, policy: Path, tmp_path: Path
) -> None:
    log = run_grpo(
        policy, reward, QUESTIONS, 2, output_dir=tmp_path, learning_rate=1e-2, num_cpus=0.5, **SHORT
    )
    assert [entry["step"] for entry in log] == [1, 2]
    for entry in log:
        assert entry["reward"] == pytest.approx(entry["rewards/grpo-test/mean"])
        assert entry["reward"] != 0.0
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.ray
def test_a_reward_that_cannot_score_ends_the_run_with_its_own_error(
    reward: RewardClient, policy: Path
) -> None:
    with pytest.raises(ScoreError, match=r"plain strings .* given to a model trained on messages"):
        run_grpo(policy, reward, ["the cat"] * 2, 1, num_cpus=0.5, **SHORT)
    with pytest.raises(RewardUnavailableError, match="'nowhere'"):
        run_grpo(policy, RewardClient("nowhere"), QUESTIONS, 1, num_cpus=0.5, **SHORT)


def test_grpo_in_this_process_takes_the_scores_as_they_are(policy: Path, reward_model: Path) -> None:
    model = RewardModel.from_pretrained(reward_model)
    given: list[float] = []

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        given.extend(model.score(prompts, completions))
        return given[-len(prompts) :]

    (entry,) = train_grpo(policy, reward, QUESTIONS, 1, **SHORT)
    assert len(given) == 4
    assert entry["reward"] == pytest.approx(sum(given) / 4, abs=1e-5)
    with pytest.raises(ConfigError, match="holds no prompt"):
        train_grpo(policy, reward, [], 1)


@pytest.mark.ray
def test_the_example_runs_with_a_service_by_name(reward: RewardClient, policy: Path) -> None:
    log = grpo_actor.main(["--policy", str(policy), "--reward", "grpo-test", "--steps", "1"])
    assert len(log) == 1
    assert "grpo-test" in serve.status().applications
    assert ray.is_initialized()
