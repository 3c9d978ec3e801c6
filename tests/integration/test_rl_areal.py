"""AReaL's own workflow and reward pool (areal 1.0.4) call our reward function, of a deployed reward model.

Real: `RLVRWorkflow` (areal/workflow/rlvr.py), `AsyncRewardWrapper` with its pool of processes
(areal/api/reward_api.py), `import_from_string`, `apply_chat_template`. Stood in for: the inference engine
(fixed answers) and the types it is asked with, AReaL's session tracing and statistics, which import its whole
engine; `areal`'s own `__init__` for the same reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rayrm.errors import RewardUnavailableError, ScoreError
from rayrm.rl.areal import RewardFunction, reward_fn
from rayrm.serve.client import RewardClient
from tests.installed import only
from tests.served import SAME, sent_together, served
from tests.tiny import WORDS, save_tiny, tiny_tokenizer

NAME = "areal-test"
ROWS = [
    {"messages": [{"role": "user", "content": f"the {word} cat?"}], "answer": word} for word in WORDS[:16]
]
ANSWERS = [" ".join(WORDS[n % 9 : n % 9 + 1 + n % 5]) for n in range(16)]


@pytest.fixture(scope="module")
def reward(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    with served(save_tiny(tmp_path_factory.mktemp("areal")), NAME) as client:
        yield client


def _as_it_is(*_: Any) -> Any:
    return lambda function: function


@pytest.fixture
def areal() -> Iterator[Any]:
    """AReaL's workflow and reward modules."""
    untraced = {
        "atrace_session_phase": lambda *_: contextlib.nullcontext(),
        "session_context": _as_it_is,
        "trace_session": _as_it_is,
    }
    scope = SimpleNamespace(scalar=lambda **_: None)
    stand_ins: dict[str, dict[str, Any]] = {
        "areal.api.cli_args": {"GenerationHyperparameters": object},
        "areal.utils.perf_tracer": untraced,
        "areal.utils.stats_tracker": {"get": lambda _: scope},
    }
    with only("areal", bare=("areal",), stand_ins=stand_ins):
        root: Any = importlib.import_module("areal")
        root.workflow_context = SimpleNamespace(stat_scope=lambda: "rollout")
        api: Any = importlib.import_module("areal.api")
        api.InferenceEngine, api.ModelResponse = object, object
        api.ModelRequest = SimpleNamespace
        importlib.import_module("areal.utils").stats_tracker = importlib.import_module(  # type: ignore[attr-defined]
            "areal.utils.stats_tracker"
        )
        rewards: Any = importlib.import_module("areal.api.reward_api")
        yield SimpleNamespace(
            rewards=rewards, workflow=importlib.import_module("areal.workflow.rlvr").RLVRWorkflow
        )
        rewards.AsyncRewardWrapper._atexit_shutdown_all()


class Engine:
    """AReaL's inference engine with answers that are known beforehand; they end as the model's do."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._answers = {
            tuple(ids_of(tokenizer, row["messages"])): answer
            for row, answer in zip(ROWS, ANSWERS, strict=True)
        }

    async def agenerate(self, asked: Any) -> Any:
        ids = self._tokenizer.encode(
            self._answers[tuple(asked.input_ids)] + "<|end|>", add_special_tokens=False
        )
        return SimpleNamespace(
            input_tokens=asked.input_ids,
            input_len=len(asked.input_ids),
            output_tokens=ids,
            output_len=len(ids),
            output_logprobs=[0.0] * len(ids),
            output_versions=[0] * len(ids),
        )


def ids_of(tokenizer: Any, messages: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def episodes(areal: Any, reward_fn: Any) -> list[float]:
    """The rewards that AReaL's workflow puts into its trajectories."""
    tokenizer = tiny_tokenizer()
    settings = SimpleNamespace(new_with_stop_and_pad_token_ids=lambda _: settings, new=lambda **_: settings)
    workflow = areal.workflow(reward_fn=reward_fn, gconfig=settings, tokenizer=tokenizer)
    engine = Engine(tokenizer)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(workflow.arun_episode(engine, row) for row in ROWS))

    return [float(trajectory["rewards"][0]) for trajectory in asyncio.run(all_of_them())]


@pytest.mark.ray
def test_areals_workflow_takes_the_services_scores_by_one_line(
    areal: Any, reward: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYRM_REWARD", NAME)
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    expected = reward.score([row["messages"] for row in ROWS], completions).scores
    assert len({round(score, 4) for score in expected}) > 8  # they tell answers apart
    assert episodes(areal, "rayrm.rl.areal.reward_fn") == pytest.approx(expected, abs=SAME)
    # The template writes nothing behind the token that ends an answer: the policy's text is the model's.
    assert episodes(areal, "rayrm.rl.areal.rendered_reward_fn") == pytest.approx(expected, abs=SAME)


@pytest.mark.ray
def test_the_pools_processes_ask_their_parent_and_travel_together(
    areal: Any, reward: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = RewardFunction(NAME)
    expected = [
        function(f"{row['messages']}", answer, [], [], **row)
        for row, answer in zip(ROWS, ANSWERS, strict=True)
    ]
    pooled = areal.rewards.AsyncRewardWrapper(function, max_workers=4)
    pids = areal.rewards.AsyncRewardWrapper(pid_of, max_workers=4)

    async def all_of_them() -> tuple[list[float], list[int]]:
        asked = (pooled("", answer, [], [], **row) for row, answer in zip(ROWS, ANSWERS, strict=True))
        return await asyncio.gather(*asked), await asyncio.gather(*(pids() for _ in range(16)))

    with sent_together(monkeypatch) as sizes:
        given, processes = asyncio.run(all_of_them())
    assert os.getpid() not in processes
    assert given == pytest.approx(expected, abs=SAME)
    assert sum(sizes) == 16  # calls that this process made for them
    assert max(sizes) > 1


def pid_of() -> int:
    return os.getpid()


def test_our_deadline_ends_before_areal_takes_zero(areal: Any) -> None:
    wrapper = inspect.signature(areal.rewards.AsyncRewardWrapper)
    # A child of the pool waits for a second more than its parent's call may take.
    assert reward_fn._settings["deadline_s"] + 1 < wrapper.parameters["timeout_seconds"].default


@pytest.mark.ray
def test_areal_is_told_why_there_is_no_reward(areal: Any, reward: RewardClient) -> None:
    def ask(function: RewardFunction, **row: Any) -> float:
        async def once() -> float:
            wrapped = areal.rewards.AsyncRewardWrapper(function, max_workers=2, max_retries=1)
            return float(await wrapped("<|user|>the cat?<|end|><|assistant|>", "a dog", [], [], **row))

        return asyncio.run(once())

    with pytest.raises(RewardUnavailableError, match="no application 'nowhere' runs"):
        ask(RewardFunction("nowhere"), **ROWS[0])
    with pytest.raises(ScoreError, match=r"no column `messages` \(it has question\)"):
        ask(RewardFunction(NAME), question="the cat?")
    with pytest.raises(ScoreError, match="position limit is 512"):
        ask(RewardFunction(NAME), messages=[{"role": "user", "content": "cat " * 900}])
