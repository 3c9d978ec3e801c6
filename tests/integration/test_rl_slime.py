"""rayrm.rl.slime as slime calls it. slime is no package on PyPI: its contract is executed here, not its code.

Read from THUDM/slime 0.3.1 (624b824a): `load_function` of `slime/utils/misc.py` takes what stands before the
last dot for the module; `slime/rollout/rm_hub/__init__.py` awaits `f(args, sample)` for each sample, and with
`--group-rm` `f(args, samples)` for a group; `slime/rollout/sglang_rollout.py` writes the answers into
`sample.reward` with `zip(samples, rewards)`; `slime/utils/types.py` has the fields of a `Sample`.
"""

from __future__ import annotations

import asyncio
import importlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rayrm.errors import RewardUnavailableError
from tests.integration.conftest import ChatService
from tests.served import SAME, texts
from tests.tiny import tiny_tokenizer


@dataclass
class Sample:
    prompt: str | list[dict[str, str]]
    response: str
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def loaded(path: str) -> Callable[..., Any]:
    """What `--custom-rm-path` names."""
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def groups(num_prompts: int, samples_each: int, *, rendered: bool) -> list[list[Sample]]:
    tokenizer = tiny_tokenizer()
    questions, responses = texts(num_prompts * samples_each)
    made = []
    for place in range(0, len(questions), samples_each):
        prompt: Any = [{"role": "user", "content": questions[place]}]
        if rendered:  # slime's --apply-chat-template; its responses keep their stop token
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        end = "<|end|>" if rendered else ""
        made.append([Sample(prompt, text + end) for text in responses[place : place + samples_each]])
    return made


def expected(service: ChatService, samples: list[Sample]) -> list[float]:
    prompts: list[Any] = [sample.prompt for sample in samples]
    if isinstance(prompts[0], str):
        return service.client.score(prompts, [sample.response for sample in samples], rendered=True).scores
    answers: list[Any] = [[{"role": "assistant", "content": sample.response}] for sample in samples]
    return service.client.score(prompts, answers).scores


async def rewarded(batch: list[list[Sample]], *, group_rm: bool) -> None:
    """A rollout's rewards: all groups at once, each sample by itself or each group as a whole."""
    function, args = loaded("rayrm.rl.slime.reward"), Namespace(group_rm=group_rm, reward_key=None)

    async def of(samples: list[Sample]) -> None:
        if group_rm:
            rewards = await function(args, samples)
        else:
            rewards = await asyncio.gather(*(function(args, sample) for sample in samples))
        for sample, reward in zip(samples, rewards, strict=False):
            sample.reward = reward

    await asyncio.gather(*map(of, batch))


@pytest.mark.ray
@pytest.mark.parametrize("group_rm", [False, True], ids=["each sample", "--group-rm"])
@pytest.mark.parametrize("rendered", [True, False], ids=["rendered", "messages"])
def test_samples_have_the_services_rewards_in_few_requests(
    chat_service: ChatService,
    requests_sent: list[int],
    monkeypatch: pytest.MonkeyPatch,
    group_rm: bool,
    rendered: bool,
) -> None:
    monkeypatch.setenv("RAYRM_REWARD", chat_service.client.name)
    batch = groups(12, 4, rendered=rendered)
    samples = [sample for group in batch for sample in group]
    asyncio.run(rewarded(batch, group_rm=group_rm))
    assert sum(requests_sent) == (12 if group_rm else 48)
    assert len(requests_sent) <= 4
    rewards = [sample.reward for sample in samples]
    assert all(type(reward) is float for reward in rewards)
    assert rewards == pytest.approx(expected(chat_service, samples), abs=SAME)
    assert len({sample.metadata["reward_version"] for sample in samples}) == 1


@pytest.mark.ray
def test_without_a_service_a_rollout_ends(chat_service: ChatService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYRM_REWARD", "gone")
    batch = groups(1, 2, rendered=True)
    with pytest.raises(RewardUnavailableError, match="no application 'gone' runs"):
        asyncio.run(rewarded(batch, group_rm=False))
    assert [sample.reward for sample in batch[0]] == [None, None]
