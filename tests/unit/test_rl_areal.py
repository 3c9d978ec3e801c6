"""AReaL's reward function: whose text it scores, and what a child is told when its parent cannot answer."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, RewardUnavailableError, ScoreError
from rayrm.rl import areal
from rayrm.rl.areal import RewardFunction, reward_fn


class Client:
    """A reward service that says the number of characters that it was asked about."""

    def score_inputs(self, inputs: list[TextInput], truncation: str | None = None) -> Any:
        if inputs[0].completion == "bad":
            raise ScoreError("`completions[0]` cannot be scored.")
        text = inputs[0].completion
        return type(
            "Result", (), {"scores": [float(len(text if isinstance(text, str) else text[0]["content"]))]}
        )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardFunction, "_client", lambda self: Client())


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|eot_id|>", "</s>", "<|im_end|>\n<|endoftext|>", "<end_of_turn>", ""]
)
def test_messages_are_scored_without_the_tokens_that_end_the_answer(alone: None, end: str) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    asked = reward_fn._input("<|user|>hi", f"a <|b|> c{end}", row)
    assert asked.prompt == row["messages"]
    assert asked.completion == [{"role": "assistant", "content": "a <|b|> c"}]
    assert not asked.rendered
    assert reward_fn("<|user|>hi", f"a <|b|> c{end}", [1], [2], **row) == 9.0


def test_rendered_text_is_scored_as_the_policy_wrote_it(alone: None) -> None:
    asked = RewardFunction(text="rendered")._input("<|user|>hi", "a<|im_end|>", {})
    assert (asked.prompt, asked.completion, asked.rendered) == ("<|user|>hi", "a<|im_end|>", True)
    assert asked.complete_turn
    with pytest.raises(ConfigError, match="'raw'"):
        RewardFunction(text="raw")  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match=r"no column `chat` \(it has messages\)"):
        RewardFunction(column="chat")("p", "c", [], [], messages=[])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_of_a_pool_gets_its_parents_answer_or_error(alone: None, start: str) -> None:
    function = RewardFunction(text="rendered")
    with ProcessPoolExecutor(2, multiprocessing.get_context(start)) as pool:
        assert [pool.submit(function, "p", "x" * n, [], []).result(timeout=120) for n in range(1, 6)] == [
            1.0,
            2.0,
            3.0,
            4.0,
            5.0,
        ]
        assert pool.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ScoreError, match="cannot be scored"):
            pool.submit(function, "p", "bad", [], []).result(timeout=120)


def test_a_child_whose_parent_is_gone_or_silent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    function: RewardFunction = pickle.loads(pickle.dumps(RewardFunction(text="rendered", deadline_s=0.2)))
    parent = function._parent
    assert parent is not None
    assert parent.pid == os.getpid()
    # As a child of this process sees it.
    monkeypatch.setattr(RewardFunction, "_parent_here", lambda self: self._parent)
    silent = threading.Event()
    monkeypatch.setattr(RewardFunction, "_scored", lambda self, asked: float(silent.wait()))
    with pytest.raises(RewardUnavailableError, match=r"no answer within 0\.2 s"):
        function("p", "c", [], [])
    silent.set()
    parent.place += "-gone"
    with pytest.raises(RewardUnavailableError, match="is gone"):
        function("p", "c", [], [])
    assert areal._server.address().place  # still answers others


def test_a_function_from_a_process_that_is_not_the_parent_calls_the_service_itself(alone: None) -> None:
    """As where a controller on another machine sends it to a rollout worker."""
    function: RewardFunction = pickle.loads(pickle.dumps(RewardFunction(text="rendered")))
    sent = function._parent
    assert sent is not None
    sent.pid, sent.place = 1, "/nowhere"
    assert function("p", "abc", [], []) == 3.0
    again: RewardFunction = pickle.loads(pickle.dumps(function))
    assert again._parent is not None
    assert again._parent.pid == os.getpid()


def test_strangers_are_not_answered() -> None:
    address = areal._server.address()
    with pytest.raises(multiprocessing.AuthenticationError):
        multiprocessing.connection.Client(address.place, "AF_UNIX", authkey=b"guess")
    multiprocessing.connection.Client(address.place, "AF_UNIX", authkey=address.key).close()
