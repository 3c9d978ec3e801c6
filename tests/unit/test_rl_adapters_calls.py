"""What verl, OpenRLHF and slime hand over becomes the texts that are scored; a failure is never a reward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import rayrm.rl.openrlhf
import rayrm.rl.slime
import rayrm.rl.verl
from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, RewardUnavailableError, ScoreError
from rayrm.rl.openrlhf import RewardLost, reward_func
from rayrm.rl.slime import reward
from rayrm.rl.verl import ServiceReward, compute_score
from rayrm.serve.client import RewardClient
from rayrm.serve.request import ScoreRequest, ScoreResult

QUESTION = [{"role": "user", "content": "why?"}]


class Service:
    """In the place of a service: keeps what it was asked; the score of a text is its place plus a half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[ScoreRequest] = []
        self.settings: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.spread: list[float] | None = None
        for module in (rayrm.rl.verl, rayrm.rl.openrlhf, rayrm.rl.slime):
            monkeypatch.setattr(module, "reward_service", self._client)

    def _client(self, name: str | None = None, model: str | None = None, **settings: Any) -> RewardClient:
        self.settings.append((name, model, settings))
        client = RewardClient(name or "reward", model=model, **settings)
        client.ask = self._ask  # type: ignore[method-assign]
        client._score = self._score  # type: ignore[method-assign]
        return client

    async def _ask(self, request: ScoreRequest) -> ScoreResult:
        self.requests.append(request)
        if self.error:
            raise self.error
        scores = [place + 0.5 for place in range(len(request.inputs))]
        return ScoreResult(scores, "v1", "reward", spread=self.spread, retries=2)

    def _score(self, inputs: Any, truncation: Any) -> ScoreResult:
        return asyncio.run(self._ask(ScoreRequest(inputs, truncation=truncation)))

    def texts(self) -> list[Any]:
        return [text for request in self.requests for text in request.inputs]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


def verl_score(extra_info: Any, **reward_kwargs: Any) -> dict[str, Any]:
    answer = compute_score(
        data_source="made", solution_str=" yes", ground_truth="no", extra_info=extra_info, **reward_kwargs
    )
    return asyncio.run(answer)


@pytest.mark.parametrize(
    "kept", [list, tuple, lambda m: np.array(m, dtype=object)], ids=["list", "tuple", "array"]
)
def test_verls_messages_are_answered_by_the_response(service: Service, kept: Callable[[Any], Any]) -> None:
    assert verl_score({"raw_prompt": kept(QUESTION), "index": 3}) == {"score": 0.5, "version": "v1"}
    assert service.texts() == [TextInput(QUESTION, [{"role": "assistant", "content": " yes"}])]


def test_verls_data_set_may_name_its_own_prompt_and_settings(service: Service) -> None:
    service.spread = [0.25]
    info = {"question": "why?", "raw_prompt": QUESTION}
    asked = verl_score(
        info, service="helpful", model="both", prompt_key="question", truncation="left", deadline_s=9.0
    )
    assert asked == {"score": 0.5, "version": "v1", "spread": 0.25}
    assert service.texts() == [TextInput("why?", " yes")]
    assert service.requests[0].truncation == "left"
    assert service.settings == [("helpful", "both", {"deadline_s": 9.0, "pin_version": None})]


@pytest.mark.parametrize("info", [None, {}, {"index": 3}, {"raw_prompt": []}, {"raw_prompt": None}])
def test_verl_without_a_prompt_is_told_what_to_type(service: Service, info: Any) -> None:
    with pytest.raises(ScoreError, match=r"ServiceReward reward\.reward_manager\.module\.path=pkg://rayrm"):
        verl_score(info)
    with pytest.raises(ScoreError, match=r"'question'\]` is missing.*name a key that the data set has"):
        verl_score(info, prompt_key="question")
    assert service.requests == []


def test_verls_rollout_is_decoded_up_to_its_last_token(service: Service) -> None:
    """Of several sequences the last counts; a data set's `extra_info` stays as it is."""

    class Rollouts(list[Any]):
        pass

    def rollout(ids: list[int], length: int) -> SimpleNamespace:
        mask = torch.tensor([0, 1, 1] + [1] * length + [0] * (len(ids) - length))
        fields = {"raw_prompt": np.array(QUESTION, dtype=object), "extra_info": own}
        return SimpleNamespace(
            batch={"responses": torch.tensor(ids), "attention_mask": mask}, non_tensor_batch=fields
        )

    own: dict[str, Any] = {"index": 3}
    words = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{ids.tolist()} {skip_special_tokens}")
    config = SimpleNamespace(reward={"reward_kwargs": {"service": "helpful"}})
    judge = ServiceReward(config=config, tokenizer=words, compute_score=print)
    answer = asyncio.run(judge.run_single(Rollouts([rollout([1, 2, 3], 3), rollout([7, 8, 9], 2)])))
    assert answer == {"reward_score": 0.5, "reward_extra_info": {"score": 0.5, "version": "v1"}}
    assert service.texts()[0].completion == [{"role": "assistant", "content": "[7, 8] True"}]
    assert own == {"index": 3}


def test_openrlhfs_queries_are_whole_rendered_texts(service: Service) -> None:
    service.spread = [0.25, 0.75]
    answer = reward_func(["<|user|>why?", "b"], ["<|user|>", ""], [None, None])
    assert service.texts() == [
        TextInput(None, text, rendered=True, complete_turn=True) for text in ("<|user|>why?", "b")
    ]
    for name in ("rewards", "scores"):
        assert torch.equal(answer[name], torch.tensor([0.5, 1.5]))
    assert {name: logged.tolist() for name, logged in answer["extra_logs"].items()} == {
        "reward_retries": [2.0, 2.0],
        "reward_spread": [0.25, 0.75],
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RewardUnavailableError("no application 'reward' runs."), "RewardUnavailableError: no application"),
        (KeyError("surprise"), "KeyError: 'surprise'"),
    ],
)
def test_openrlhf_cannot_swallow_a_failure(service: Service, error: Exception, told: str) -> None:
    """It catches each `Exception` of a reward file and trains on without the reward."""
    service.error = error
    with pytest.raises(RewardLost, match=told) as lost:
        reward_func(["a"], ["a"], [None])
    assert not isinstance(lost.value, Exception)
    assert lost.value.__cause__ is error


def test_openrlhf_is_told_which_query_is_no_text(service: Service) -> None:
    with pytest.raises(RewardLost, match=r"`queries\[1\]` \(None\) must be a string"):
        reward_func(["a", None], ["a", "b"], [None, None])  # type: ignore[list-item]


def slime_sample(prompt: Any, response: str = " yes") -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, response=response, label="no", metadata={"rm_type": ""})


def test_slimes_sample_is_a_float_and_its_group_a_list(service: Service) -> None:
    one = slime_sample("<|user|>why?")
    assert asyncio.run(reward(None, one, evaluation=True)) == 0.5
    assert one.metadata == {"rm_type": "", "reward_version": "v1"}
    group = [slime_sample("<|user|>why?", "a"), slime_sample(QUESTION, "b")]
    assert asyncio.run(reward(None, group)) == [0.5, 1.5]
    assert asyncio.run(reward(None, [])) == []
    assert [len(request.inputs) for request in service.requests] == [1, 2]
    assert service.texts() == [
        TextInput("<|user|>why?", " yes", rendered=True, complete_turn=True),
        TextInput("<|user|>why?", "a", rendered=True, complete_turn=True),
        TextInput(QUESTION, [{"role": "assistant", "content": "b"}]),
    ]


def test_slimes_bad_sample_is_named(service: Service) -> None:
    with pytest.raises(ScoreError, match=r"samples\[1\]\.response"):
        asyncio.run(reward(None, [slime_sample("a"), slime_sample("b", None)]))  # type: ignore[arg-type]
    assert service.requests == []


def test_slimes_fan_out_in_a_group_is_told_what_to_type(service: Service) -> None:
    with pytest.raises(ScoreError, match=r"list of lists.*Leave `--group-rm` out"):
        asyncio.run(reward(None, [[slime_sample("a")], [slime_sample("b")]]))
    assert service.requests == []


def test_verls_misspelt_setting_is_refused_at_the_start() -> None:
    config = SimpleNamespace(reward={"reward_kwargs": {"deadlines": 9.0}})
    with pytest.raises(
        ConfigError, match=r"reward_kwargs\.deadlines` is unknown\. Did you mean `deadline_s`"
    ):
        ServiceReward(config=config, tokenizer=None)
