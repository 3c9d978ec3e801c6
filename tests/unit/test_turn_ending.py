"""A policy stops at its end-of-turn token; its text is scored as training saw it, to the template's end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import rayrm.rl.areal
import rayrm.rl.openrlhf
import rayrm.rl.slime
from rayrm.serve.client import RewardClient
from rayrm.serve.http import build_app
from rayrm.serve.scorer import RewardModel
from tests.tiny import CHAT_TEMPLATE, save_tiny
from tests.unit.test_protocols import ready, service_of

ASKED = [{"role": "user", "content": "why is the river old?"}]
ANSWER = "two stones"
ENDS = {"newline": "<|end|>\n", "token": "<|end|>\n<|tool|>", "nothing": "<|end|>"}


class ChatML:
    """A model whose template writes `end` after each message, as ChatML a newline, and its callers."""

    def __init__(self, directory: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        save_tiny(directory, chat=True)
        template = CHAT_TEMPLATE.replace(
            "{{ m['content'] }}<|end|>", "{{ m['content'] }}" + end.replace("\n", "{{ '\\n' }}")
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        self.model = RewardModel.from_pretrained(directory)
        self.http = TestClient(build_app(service_of(self.model), ready))
        self.prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
        client = RewardClient("reward")
        client.ask = service_of(self.model)  # type: ignore[method-assign]
        client.score_inputs = lambda inputs, truncation=None: SimpleNamespace(  # type: ignore[method-assign, assignment]
            scores=self.model.score_inputs(inputs), version="v1", model="reward", retries=0, spread=None
        )
        for module in (rayrm.rl.areal, rayrm.rl.openrlhf, rayrm.rl.slime):
            monkeypatch.setattr(module, "reward_service", lambda *named, **settings: client)

    def of_policy(self, answer: str) -> dict[str, float]:
        """The score of what a policy wrote, by each way that takes it."""
        whole, post = self.prompt + answer, self.http.post
        sample: Any = SimpleNamespace(prompt=self.prompt, response=answer, metadata={})
        return {
            "/get_reward": post("/get_reward", json={"query": [whole]}).json()["rewards"][0],
            "/reward": post("/reward", json={"prompt": self.prompt, "response": answer}).json(),
            "/v1/score/evaluation": post("/v1/score/evaluation", json={"messages": [whole]}).json()["scores"][
                0
            ],
            "areal": rayrm.rl.areal.rendered_reward_fn(self.prompt, answer),
            "openrlhf": float(rayrm.rl.openrlhf.reward_func([whole], [""], [None])["rewards"][0]),
            "slime": asyncio.run(rayrm.rl.slime.reward(None, sample)),
        }

    def rendered(self, answer: str) -> float:
        """Of rendered text as anyone gives it: nothing is added."""
        return self.model.score([self.prompt], [answer], rendered=True)[0]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_policys_text_has_the_score_of_its_messages(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ChatML(tmp_path, end, monkeypatch)
    messages = served.model.score([ASKED], [[{"role": "assistant", "content": ANSWER}]])[0]
    for known in range(len("<|end|>"), len(end) + 1):
        assert served.of_policy(ANSWER + end[:known]) == pytest.approx(
            dict.fromkeys(WAYS, messages), abs=1e-5
        )
    if end != "<|end|>":
        assert served.rendered(ANSWER + "<|end|>") != pytest.approx(messages, abs=1e-5)


@pytest.mark.parametrize("cut", [ANSWER, ANSWER + "<|en", ANSWER + "<|end|> ", ANSWER + "</s>"])
def test_a_text_that_does_not_end_its_turn_stays_as_it_is(
    tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ChatML(tmp_path, ENDS["newline"], monkeypatch)
    assert served.of_policy(cut) == pytest.approx(dict.fromkeys(WAYS, served.rendered(cut)), abs=1e-5)


WAYS = ["/get_reward", "/reward", "/v1/score/evaluation", "openrlhf", "slime", "areal"]
