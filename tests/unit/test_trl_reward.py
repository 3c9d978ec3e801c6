"""What TRL's trainers are given for a reward, and what their log is told: by models in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.shaping import Shaping
from rayrm.rl.trl import HELDOUT, AsyncTRLReward, TRLReward, versions_in
from rayrm.serve.request import ScoreResult, Timing, Truncation
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny

PROMPTS = [[{"role": "user", "content": text}] for text in ("the red cat?", "the red cat?", "old?")]
COMPLETIONS = [
    [{"role": "assistant", "content": text}] for text in ("blue", "red red red red red red", "a dog")
]
IDS = [[5], [6] * 6, [7, 8]]


class InProcess:
    """A client whose service is a model here."""

    def __init__(self, path: Path, name: str) -> None:
        self.model = RewardModel.from_pretrained(path)
        self.__name__ = name

    def score_inputs(self, inputs: Sequence[TextInput], truncation: Truncation | None = None) -> ScoreResult:
        scores = self.model.score_inputs(inputs, truncation=truncation)
        return ScoreResult(scores, f"{self.__name__}-1", timing=Timing(total_s=0.5), retries=2)

    async def score_inputs_async(
        self, inputs: Sequence[TextInput], truncation: Truncation | None = None
    ) -> ScoreResult:
        return self.score_inputs(inputs, truncation)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("clients")
    return {name: InProcess(save_tiny(root / name, seed=n), name) for n, name in enumerate(("a", "b"))}


def called(reward: TRLReward, step: int = 3, **columns: Any) -> tuple[list[float], dict[str, float]]:
    logged: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    given = {
        "trainer_state": SimpleNamespace(global_step=step - 1),
        "log_metric": logged.__setitem__,
        "log_extra": extra.__setitem__,
        **columns,
    }
    return reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, **given), logged


def test_a_reward_is_the_score_and_the_log_says_which_version_gave_it(
    clients: dict[str, Any], tmp_path: Path
) -> None:
    reward = TRLReward(clients["a"], gold=clients["b"], samples=tmp_path)
    rewards, logged = called(reward, kind=["x", "y", "z"])
    scores = clients["a"].model.score(PROMPTS, COMPLETIONS)
    gold = clients["b"].model.score(PROMPTS, COMPLETIONS)
    assert rewards == pytest.approx(scores)
    assert logged["a/score_mean"] == pytest.approx(np.mean(scores))
    assert logged["a/score_std"] == pytest.approx(np.std(scores))
    assert logged["a/gold_mean"] == pytest.approx(np.mean(gold))
    assert logged["a/latency_s"] == 0.5
    assert logged["a/retries"] == 2
    assert logged["a/truncated"] == 0
    assert logged["a/length_correlation"] == pytest.approx(np.corrcoef(scores, [1, 6, 2])[0, 1])
    assert 0 < logged["a/repetition"] < 1
    assert versions_in(logged) == ["a-1"]
    lines = [json.loads(line) for line in (tmp_path / "samples-0.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == COMPLETIONS
    assert [line["prompt"] for line in lines] == PROMPTS
    assert {(line["step"], line["version"]) for line in lines} == {(3, "a-1")}
    assert [line["score"] for line in lines] == pytest.approx(scores)


def test_several_rewards_are_shaped_each_and_added_up(clients: dict[str, Any], tmp_path: Path) -> None:
    reward = TRLReward(clients, weights={"b": -0.5}, shaping=Shaping(clip=0.1), samples=tmp_path)
    rewards, logged = called(reward)
    first, second = (client.model.score(PROMPTS, COMPLETIONS) for client in clients.values())
    assert max(map(abs, [*first, *second])) > 0.1
    by_hand = [
        np.clip(a, -0.1, 0.1) - 0.5 * np.clip(b, -0.1, 0.1) for a, b in zip(first, second, strict=True)
    ]
    assert rewards == pytest.approx(by_hand)
    assert versions_in(logged) == ["a-1", "b-1"]
    lines = [json.loads(line) for line in (tmp_path / "samples-0.jsonl").read_text().splitlines()]
    raw = [a - 0.5 * b for a, b in zip(first, second, strict=True)]
    assert [line["score"] for line in lines] == pytest.approx(raw)
    assert [line["reward"] for line in lines] == pytest.approx(by_hand)
    assert lines[0]["version"] == "a-1+b-1"
    with pytest.raises(ConfigError, match="weight `c`: no reward has this name"):
        TRLReward(clients, weights={"c": 1.0})


def test_the_async_form_gives_the_same(clients: dict[str, Any]) -> None:
    shaping = Shaping(normalize=True, length_penalty=0.1, length_free=1)
    plain = TRLReward(clients, shaping=shaping)
    other = AsyncTRLReward(clients, shaping=shaping)
    for _ in range(2):
        expected, _ = called(plain)
        got = asyncio.run(other(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS))
        assert got == pytest.approx(expected)
    score = np.array(clients["a"].model.score(PROMPTS, COMPLETIONS))
    single = TRLReward(clients["a"], shaping=shaping)
    by_hand = (score - score.mean()) / score.std() - 0.1 * np.array([0, 5, 1])
    assert called(single)[0] == pytest.approx(by_hand)


def test_held_out_prompts_are_kept_unshaped_and_move_no_statistics(clients: dict[str, Any]) -> None:
    reward = TRLReward(clients["a"], shaping=Shaping(normalize=True))
    first, _ = called(reward)
    state = reward.state_dict()
    scores, _ = called(reward, **{HELDOUT: [0, 0, 1]})
    assert scores == pytest.approx(clients["a"].model.score(PROMPTS, COMPLETIONS))
    assert reward.state_dict() == state
    assert [sample.prompt for sample in reward.heldout] == [0, 0, 1]
    assert [sample.completion for sample in reward.heldout] == ["blue", "red red red red red red", "a dog"]
    other = TRLReward(clients["a"], shaping=Shaping(normalize=True))
    other.load_state_dict(state)
    assert called(other)[0] == called(reward)[0]
    assert first != scores


def test_a_text_beyond_the_positions_is_cut_where_that_is_asked_for(clients: dict[str, Any]) -> None:
    long = [[{"role": "assistant", "content": "red " * 5000}]]
    with pytest.raises(ScoreError, match="truncation"):
        TRLReward(clients["a"])(prompts=PROMPTS[:1], completions=long)
    cut = TRLReward(clients["a"], truncation="left")(prompts=PROMPTS[:1], completions=long)
    assert cut == pytest.approx(clients["a"].model.score(PROMPTS[:1], long, truncation="left"))


def test_half_a_line_of_a_killed_process_spoils_no_other(clients: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "samples-0.jsonl").write_text('{"step": 1, "prom')
    called(TRLReward(clients["a"], samples=tmp_path))
    lines = (tmp_path / "samples-0.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(line)["step"] for line in lines[1:]] == [3, 3, 3]


def test_what_cannot_be_scored_raises(clients: dict[str, Any]) -> None:
    reward = TRLReward(clients["a"], shaping=Shaping(calibrate_column="kind"))
    with pytest.raises(ScoreError, match="they go in pairs"):
        reward(prompts=PROMPTS, completions=COMPLETIONS[:1])
    with pytest.raises(ConfigError, match=r"`calibrate_column` \('kind'\)"):
        called(reward)
