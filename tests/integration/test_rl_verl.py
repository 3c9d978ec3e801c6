"""verl 0.9.1's own reward workers, loading and calling rayrm.rl.verl, and posting to the service as to vLLM.

Real: `RewardLoopManager` and its Ray actors, `RewardLoopWorker`, the loading of functions and managers, the
naive manager, `DataProto`, the default configuration of `reward`. Made here: the rollouts, as
`AgentLoopWorker._compute_score` packs them. Needs of verl no GPU, vLLM or SGLang.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer

from rayrm.errors import ConfigError, RewardUnavailableError, ScoreError
from tests.integration.conftest import ChatService
from tests.served import SAME, texts

pytest.importorskip("verl", reason="verl is not installed; `make env` installs it")

BY_MANAGER = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=ServiceReward",
    "reward.reward_manager.module.path=pkg://rayrm.rl.verl",
]
BY_FUNCTION = [
    "reward.custom_reward_function.path=pkg://rayrm.rl.verl",
    "reward.custom_reward_function.name=compute_score",
]


def config_of(model: Path, *words: str) -> Any:
    """verl's default reward settings, changed as on its command line."""
    import verl
    from omegaconf import OmegaConf

    settings = Path(verl.__file__).parent / "trainer/config/reward/reward.yaml"
    policy = {"model": {"path": str(model), "tokenizer_path": None}}
    config = OmegaConf.create({"actor_rollout_ref": policy, "reward": OmegaConf.load(settings)})
    return OmegaConf.merge(config, OmegaConf.from_dotlist(["reward.num_workers=2", *words]))


def rollouts(model: Path, count: int, *, in_extra_info: bool = False) -> tuple[Any, list[Any], list[str]]:
    """`count` rollouts as verl hands them to its reward workers, their prompts and their responses."""
    from verl import DataProto

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions, responses = texts(count)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    asked = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    said = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in responses]
    wide, long = max(map(len, asked)), max(map(len, said))
    tensors = {
        "prompts": torch.tensor([[0] * (wide - len(ids)) + ids for ids in asked]),
        "responses": torch.tensor([ids + [0] * (long - len(ids)) for ids in said]),
        "attention_mask": torch.tensor(
            [
                [0] * (wide - len(a)) + [1] * (len(a) + len(s)) + [0] * (long - len(s))
                for a, s in zip(asked, said, strict=True)
            ]
        ),
    }
    columns: dict[str, list[Any]] = {
        "data_source": ["made"] * count,
        "reward_model": [{"style": "model", "ground_truth": ""} for _ in prompts],
        "extra_info": [{"index": place} for place in range(count)],
    }
    if in_extra_info:  # the older trainer's: everything that the agent loop knows of its rollout
        columns["tool_extra_fields"] = [{"raw_prompt": prompt, "turn_scores": []} for prompt in prompts]
    else:
        columns["raw_prompt"] = prompts
    arrays = {}
    for name, column in columns.items():
        arrays[name] = np.empty(count, dtype=object)
        arrays[name][:] = column
    return DataProto.from_dict(tensors, non_tensors=arrays), prompts, responses


def expected(service: ChatService, prompts: list[Any], responses: list[str]) -> list[float]:
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in responses]
    return service.client.score(prompts, completions).scores


def worker_scores(config: Any, data: Any, router: str | None = None) -> list[dict[str, Any]]:
    """What a reward worker of verl answers for a batch, here in this process."""
    from verl.experimental.reward_loop import RewardLoopWorker

    async def ask() -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = await RewardLoopWorker(config, router).compute_score_batch(data)
        return answers

    return asyncio.run(ask())


@pytest.mark.ray
def test_verls_workers_place_the_services_reward_at_each_last_token(chat_service: ChatService) -> None:
    """Through the manager that the README names, for which the prompt is `raw_prompt` alone."""
    from verl.experimental.reward_loop import RewardLoopManager

    named = f"reward.reward_kwargs.service={chat_service.client.name}"
    loop = RewardLoopManager(config_of(chat_service.path, *BY_MANAGER, named))
    data, prompts, responses = rollouts(chat_service.path, 12)
    try:
        found = loop.compute_rm_score(data)
    finally:
        for worker in loop.reward_loop_workers:
            ray.kill(worker)
    placed = found.batch["rm_scores"]
    lengths = data.batch["attention_mask"][:, data.batch["prompts"].size(1) :].sum(1)
    wanted = torch.zeros_like(placed)
    wanted[torch.arange(12), lengths - 1] = torch.tensor(expected(chat_service, prompts, responses))
    assert torch.allclose(placed, wanted, atol=SAME)
    version = chat_service.client.score([prompts[0]], [[{"role": "assistant", "content": "a"}]]).version
    assert set(found.non_tensor_batch["version"]) == {version}
    assert found.meta_info["reward_extra_keys"] == ["score", "version"]


@pytest.mark.ray
@pytest.mark.parametrize("words", [BY_FUNCTION, BY_MANAGER], ids=["function", "manager"])
def test_calls_of_one_sample_become_few_requests(
    chat_service: ChatService, requests_sent: list[int], words: list[str]
) -> None:
    place = "reward.custom_reward_function" if words is BY_FUNCTION else "reward"
    config = config_of(chat_service.path, *words, f"{place}.reward_kwargs.service={chat_service.client.name}")
    data, prompts, responses = rollouts(chat_service.path, 48, in_extra_info=words is BY_FUNCTION)
    answers = worker_scores(config, data)
    assert sum(requests_sent) == 48
    assert len(requests_sent) <= 12
    scores = [answer["reward_score"] for answer in answers]
    assert scores == pytest.approx(expected(chat_service, prompts, responses), abs=SAME)
    assert len({answer["reward_extra_info"]["version"] for answer in answers}) == 1


@pytest.mark.ray
def test_a_rollout_without_prompt_or_service_has_no_reward(chat_service: ChatService) -> None:
    data, _, _ = rollouts(chat_service.path, 2)
    with pytest.raises(ScoreError, match=r"'raw_prompt'.* is missing.*the keys here: index, num_turns"):
        worker_scores(config_of(chat_service.path, *BY_FUNCTION), data)
    with pytest.raises(RewardUnavailableError, match="no application 'gone' runs"):
        worker_scores(config_of(chat_service.path, *BY_MANAGER, "reward.reward_kwargs.service=gone"), data)
    with pytest.raises(ConfigError, match=r"which asks the reward service alone\. Remove one"):
        worker_scores(config_of(chat_service.path, *BY_MANAGER, *BY_FUNCTION), data)


@pytest.mark.ray
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_verl_posts_to_its_own_reward_servers_is_answered(
    chat_service: ChatService, engine: str
) -> None:
    config = config_of(
        chat_service.path,
        "reward.reward_model.enable=true",
        f"reward.reward_model.model_path={chat_service.path}",
        f"reward.reward_model.rollout.name={engine}",
    )
    data, prompts, responses = rollouts(chat_service.path, 6)
    answers = worker_scores(config, data, chat_service.url.removeprefix("http://"))
    scores = [answer["reward_score"] for answer in answers]
    assert scores == pytest.approx(expected(chat_service, prompts, responses), abs=SAME)
