"""OpenRLHF 0.11.2's own rollout executor, loading rayrm/rl/openrlhf.py and posting to /get_reward.

Real: `SingleTurnAgentExecutor` (the loading, threads, HTTP calls), and how `SamplesGenerator` makes an
`Experience` of its answer. Its packages load vLLM and flash-attn as they are imported, so their modules are
imported under packages without a body. Stand-ins: vLLM's engine and names, which this path does not call.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from transformers import AutoTokenizer

import rayrm.rl.openrlhf
from tests.integration.conftest import ChatService
from tests.served import SAME, texts

SPEC = importlib.util.find_spec("openrlhf")
if SPEC is None:
    pytest.skip("openrlhf is not installed; `make env` has it where it can", allow_module_level=True)

FILE = rayrm.rl.openrlhf.__file__
STAND_INS = {
    "openrlhf.trainer.ray.vllm_engine": {"batch_vllm_engine_call": None},
    "vllm": {"SamplingParams": None},
}


def openrlhf_module(name: str) -> Any:
    """A module of OpenRLHF, without what its packages import."""
    root = Path((SPEC.submodule_search_locations or [""])[0])
    names = ["utils", "trainer", "trainer.ppo_utils", "trainer.ray"]
    packages = {f"openrlhf.{name}": [str(root.joinpath(*name.split(".")))] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for package, place in packages.items():
            patch.setitem(sys.modules, package, types.ModuleType(package))
            sys.modules[package].__path__ = place
        for module, members in STAND_INS.items():
            patch.setitem(sys.modules, module, types.ModuleType(module))
            vars(sys.modules[module]).update(members)
        return importlib.import_module(name)


class Engine:
    """vLLM's engine as the executor asks it: here each prompt has its answer already."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers = answers

    async def generate(self, ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        await asyncio.sleep(0)
        said = SimpleNamespace(token_ids=self.answers[tuple(ids)], finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[said])


def rollouts(model: Path, count: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Rendered prompts, answers as the policy wrote them, what the executor is told beside a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{text} {place}"}], add_generation_prompt=True, tokenize=False
        )
        for place, text in enumerate(texts(count)[0])
    ]
    answers = [text + "<|end|>" for text in texts(count)[1]]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    said = tokenizer(answers, add_special_tokens=False)["input_ids"]
    engine = Engine({tuple(asked): answer for asked, answer in zip(ids, said, strict=True)})
    params = SimpleNamespace(max_tokens=64, logprobs=None)
    return prompts, answers, {"sampling_params": params, "max_length": 4096, "hf_tokenizer": tokenizer,
                              "llm_engine": engine}  # fmt: skip


async def executed(executor: Any, prompts: list[str], **told: Any) -> list[dict[str, Any]]:
    return await asyncio.gather(*(executor.execute(prompt, "label", **told) for prompt in prompts))


@pytest.mark.ray
def test_the_executor_loads_the_file_and_its_rewards_are_the_services(
    chat_service: ChatService, requests_sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYRM_REWARD", chat_service.client.name)
    executor = openrlhf_module("openrlhf.utils.agent").SingleTurnAgentExecutor([FILE])
    prompts, answers, told = rollouts(chat_service.path, 24)
    # Loading takes as long as the first call; the threads of a warm process meet.
    asyncio.run(executed(executor, prompts[:1], **told))
    requests_sent.clear()
    found = asyncio.run(executed(executor, prompts, **told))
    assert sum(requests_sent) == 24
    assert len(requests_sent) <= 12
    wanted = torch.tensor(chat_service.client.score(prompts, answers, rendered=True).scores)

    generator = openrlhf_module("openrlhf.trainer.ppo_utils.samples_generator").SamplesGenerator
    turn = object.__new__(generator)._process_response_into_experience
    experiences = [turn(response, max_len=4096) for response in found]
    concat = openrlhf_module("openrlhf.trainer.ppo_utils.experience").Experience.concat_experiences
    batch = concat(experiences, 0)
    for rewards in (batch.rewards, batch.scores, batch.info["reward"], batch.info["score"]):
        assert rewards.shape == (24,)
        assert torch.allclose(rewards, wanted, atol=SAME)
    assert batch.info["reward_retries"].tolist() == [0.0] * 24


@pytest.mark.ray
def test_the_executor_reads_the_same_rewards_over_http(chat_service: ChatService) -> None:
    executor = openrlhf_module("openrlhf.utils.agent").SingleTurnAgentExecutor(
        [f"{chat_service.url}/get_reward"]
    )
    prompts, answers, told = rollouts(chat_service.path, 8)
    found = asyncio.run(executed(executor, prompts, **told))
    wanted = chat_service.client.score(prompts, answers, rendered=True).scores
    assert [one["reward"] for one in found] == [[pytest.approx(score, abs=SAME)] for score in wanted]
    assert [one["scores"] for one in found] == [one["reward"] for one in found]


class RolloutActor:
    """What OpenRLHF's `RolloutRayActor` does for a prompt."""

    async def generate_responses(self, prompts: list[str], told: dict[str, Any]) -> list[dict[str, Any]]:
        executor = openrlhf_module("openrlhf.utils.agent").SingleTurnAgentExecutor([FILE])
        return await executed(executor, prompts, **told)


@pytest.mark.ray
def test_a_service_that_is_gone_ends_the_rollout(chat_service: ChatService) -> None:
    """An exception would be a line in OpenRLHF's log, and the reward None."""
    prompts, _, told = rollouts(chat_service.path, 2)
    told["hf_tokenizer"] = AutoTokenizer.from_pretrained(chat_service.path)
    environment = {"env_vars": {"RAYRM_REWARD": "gone"}}
    actor = ray.remote(RolloutActor).options(num_cpus=0, runtime_env=environment).remote()
    try:
        with pytest.raises(ray.exceptions.RayTaskError, match=r"RewardLost.*no application 'gone' runs"):
            ray.get(actor.generate_responses.remote(prompts, told))
    finally:
        ray.kill(actor)
