"""SkyRL's environment by itself: what it returns, refuses and counts."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rayrm.errors import MissingExtraError, ScoreError
from rayrm.serve.client import RewardClient
from rayrm.serve.request import ScoreResult, Timing

PROMPT = [{"role": "user", "content": "the cat?"}]


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("skyrl_gym", reason="skyrl_gym is not installed (`make env` installs it)")
    asked: list[Any] = []

    def score(self: RewardClient, prompts: Any, completions: Any, *, truncation: str | None) -> ScoreResult:
        asked.append((prompts, completions, truncation))
        timing = Timing(total_s=0.5)
        return ScoreResult([0.25], "v1", "m", [9], [0], [0.125], timing=timing, retries=2)

    monkeypatch.setattr(RewardClient, "score", score)
    return SimpleNamespace(env=importlib.import_module("rayrm.rl.skyrl").RewardEnv, asked=asked)


def test_a_step_returns_the_score_and_ends_the_episode(skyrl: Any) -> None:
    env = skyrl.env({}, extras={"max_turns": 3}, service="some", truncation="left")
    assert env.init(PROMPT) == (PROMPT, {})
    assert env.step("a dog") == {
        "observations": [],
        "reward": 0.25,
        "done": True,
        "metadata": {"version": "v1", "model": "m", "truncated": True},
    }
    assert skyrl.asked == [([PROMPT], [[{"role": "assistant", "content": "a dog"}]], "left")]
    assert env.turns == 1


def test_metrics_are_means_and_shares_of_versions(skyrl: Any) -> None:
    env = skyrl.env()
    assert env.get_metrics() == {}
    env.init(PROMPT)
    env.step("a dog")
    first = env.get_metrics()
    assert first == {
        "score": 0.25,
        "latency_s": 0.5,
        "retries": 2,
        "truncated": True,
        "version": "v1",
        "spread": 0.125,
    }
    others = [{**first, "version": "v2", "score": 1.25}] * 3
    told = skyrl.env.aggregate_metrics([first, *others])
    assert told["score"] == 1.0
    assert (told["version/v1"], told["version/v2"]) == (0.25, 0.75)
    assert (told["retries"], told["truncated"]) == (2.0, 1.0)


def test_a_step_before_init_is_refused(skyrl: Any) -> None:
    with pytest.raises(ScoreError, match="`step` before `init`"):
        skyrl.env().step("a dog")
    with pytest.raises(ScoreError, match="`truncation`"):
        skyrl.env(truncation="middle")


def test_without_skyrl_gym_the_import_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rayrm.rl.skyrl", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "skyrl_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skyrl_gym", None)
    with pytest.raises(MissingExtraError, match="Type: pip install skyrl-gym"):
        importlib.import_module("rayrm.rl.skyrl")
