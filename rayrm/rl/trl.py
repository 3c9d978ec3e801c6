"""Rewards as TRL's trainers call them, with what a training log should say of them.

A `RewardClient` is a TRL reward function as it stands. `TRLReward` is one that shapes its scores, writes to
TRL's log which version gave them and how they look, watches a second (gold) reward, and keeps every sample.
`AsyncTRLReward` is the same for asyncio: TRL runs such functions at the same time as each other
(`GRPOTrainer`, `RLOOTrainer`) and, in its `AsyncGRPOTrainer`, while the policy generates.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.data.messages import Text
from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, writing
from rayrm.rl.guard import length_correlation, repetition
from rayrm.rl.service import figures_of, scores_by_one_version
from rayrm.rl.shaping import Shaper, Shaping, weighted
from rayrm.serve.client import RewardClient
from rayrm.serve.request import ScoreResult, Truncation, check_truncation, row_inputs

_GOLD = " gold"
SQUARE = "score_square_mean"
"""TRL averages what ranks log: by this a log has the deviation of all scores, and not the ranks' mean one."""
HELDOUT = "heldout_prompt"
"""The column that marks a prompt of the held-out set, with its number: such rewards are kept as they are."""


@dataclass(frozen=True, slots=True)
class HeldoutSample:
    """A fresh sample of a held-out prompt (its number): what the policy wrote, its score, which version's."""

    prompt: int
    completion: str
    score: float
    version: str = ""


class TRLReward:
    """A reward function for TRL's GRPO and RLOO trainers.

    Args:
        reward: the service's client, or its name; several by name are added up.
        weights: of several rewards, by name; 1 where it says nothing.
        shaping: what becomes of each score before it is a reward; None: nothing.
        gold: another reward that is logged and never trained on, such as a larger model's.
        truncation: what to do with a text beyond the reward model's positions; None: refuse.
        samples: a directory in which each rank appends what was scored to `samples-<rank>.jsonl`.

    A call returns one finite float for each completion or raises what `RewardClient.score` and `Shaper.shape`
    raise.
    """

    def __init__(
        self,
        reward: RewardClient | str | Mapping[str, RewardClient] = "reward",
        *,
        weights: Mapping[str, float] | None = None,
        shaping: Shaping | None = None,
        gold: RewardClient | None = None,
        truncation: Truncation | None = None,
        samples: str | Path | None = None,
    ) -> None:
        if isinstance(reward, str):
            reward = RewardClient(reward)
        self.clients = dict(reward) if isinstance(reward, Mapping) else {reward.__name__: reward}
        self.weights = {**dict.fromkeys(self.clients, 1.0), **(weights or {})}
        weighted({name: [] for name in self.clients}, self.weights)  # raises for names that do not match
        self.gold = gold
        check_truncation(truncation)
        self.truncation = truncation
        self.shapers = {name: Shaper(shaping) for name in self.clients}
        self.samples = None if samples is None else Path(samples)
        self.heldout: list[HeldoutSample] = []
        """What was scored of held-out prompts since it was last emptied."""
        self.__name__ = "+".join(self.clients)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        try:
            call = _Call.of(prompts, completions, completion_ids, columns)
            results = {
                name: client.score_inputs(call.inputs, truncation=self.truncation)
                for name, client in self._asked().items()
            }
        except Exception:
            if HELDOUT not in columns:
                self._first_shaper().give_up()  # where other ranks would wait for this one's scores
            raise
        if call.heldout is not None:
            return self._keep_heldout(call, results)
        rewards = {
            name: shaper.shape(results[name], lengths=call.lengths, datasets=self._datasets(call))
            for name, shaper in self.shapers.items()
        }
        return self._told(call, results, rewards)

    async def call_async(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """As a plain call, for asyncio: all rewards are asked at once, and the event loop stays free."""
        try:
            call = _Call.of(prompts, completions, completion_ids, columns)
            asked = self._asked()
            found = await asyncio.gather(
                *(
                    client.score_inputs_async(call.inputs, truncation=self.truncation)
                    for client in asked.values()
                )
            )
            results = dict(zip(asked, found, strict=True))
        except Exception:
            if HELDOUT not in columns:
                await self._first_shaper().give_up_async()
            raise
        if call.heldout is not None:
            return self._keep_heldout(call, results)
        # One after the other: ranks share statistics in the same order.
        rewards = {
            name: await shaper.shape_async(results[name], lengths=call.lengths, datasets=self._datasets(call))
            for name, shaper in self.shapers.items()
        }
        return self._told(call, results, rewards)

    def score_by_one_version(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> tuple[list[float], str]:
        """The scores, weighted and unshaped, by one version of each reward, and which; however many texts."""
        inputs = row_inputs(prompts, completions, columns)
        found = {
            name: scores_by_one_version(client, inputs, truncation=self.truncation)
            for name, client in self.clients.items()
        }
        scores = weighted({name: given for name, (given, _) in found.items()}, self.weights)
        return scores, "+".join(version for _, version in found.values())

    def state_dict(self) -> dict[str, Any]:
        """What the shaping has seen, by reward; the same on every rank."""
        return {name: shaper.state_dict() for name, shaper in self.shapers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same rewards."""
        for name, shaper in self.shapers.items():
            shaper.load_state_dict(state[name])

    def _asked(self) -> dict[str, RewardClient]:
        return self.clients if self.gold is None else {**self.clients, _GOLD: self.gold}

    def _datasets(self, call: _Call) -> list[Any] | None:
        """Which data set each row belongs to, where the calibration is by a column."""
        return call.columns.get(self._first_shaper().settings.calibrate_column or "")

    def _first_shaper(self) -> Shaper:
        return next(iter(self.shapers.values()))

    def _total(self, results: Mapping[str, ScoreResult]) -> list[float]:
        return weighted({name: results[name].scores for name in self.clients}, self.weights)

    def _version(self, results: Mapping[str, ScoreResult]) -> str:
        return "+".join(results[name].version for name in self.clients)

    def _keep_heldout(self, call: _Call, results: dict[str, ScoreResult]) -> list[float]:
        assert call.heldout is not None
        scores, version = self._total(results), self._version(results)
        self.heldout += [
            HeldoutSample(int(number), text, score, version)
            for number, text, score in zip(call.heldout, call.texts, scores, strict=True)
        ]
        self._log(call, results)
        return scores

    def _told(
        self, call: _Call, results: dict[str, ScoreResult], rewards: dict[str, list[float]]
    ) -> list[float]:
        total = weighted(rewards, self.weights)
        self._log(call, results)
        version = self._version(results)
        if call.log_extra is not None:
            call.log_extra("reward_version", [version] * len(total))
        if self.samples is not None:
            _append(self.samples, call, self._total(results), total, version)
        return total

    def _log(self, call: _Call, results: Mapping[str, ScoreResult]) -> None:
        if call.log_metric is None:
            return
        for name in self.clients:
            for figure, value in _figures(call, results[name]).items():
                call.log_metric(f"{name}/{figure}", float(value))
        if len(self.clients) > 1:
            call.log_metric(f"{self.__name__}/score_mean", float(np.mean(self._total(results))))
        if _GOLD in results:
            gold = results[_GOLD]
            call.log_metric(f"{self.__name__}/gold_mean", float(np.mean(gold.scores)))
            call.log_metric(f"{self.__name__}/gold_version/{gold.version}", 1.0)


def _figures(call: _Call, result: ScoreResult) -> dict[str, float]:
    """What the log says of one reward's answer."""
    return {
        **figures_of(result),
        "score_std": float(np.std(result.scores)),
        SQUARE: float(np.mean(np.square(result.scores))),
        "length_correlation": length_correlation(result.scores, call.lengths),
        "repetition": float(np.mean([repetition(text) for text in call.texts])),
    }


class AsyncTRLReward:
    """`TRLReward` as an async function, by the same arguments; or a `TRLReward` that is there already."""

    def __init__(
        self,
        reward: TRLReward | RewardClient | str | Mapping[str, RewardClient] = "reward",
        **settings: Any,
    ) -> None:
        self.reward = TRLReward(reward, **settings) if not isinstance(reward, TRLReward) else reward
        if self.reward is reward and settings:
            raise ConfigError(f"{', '.join(settings)}: a TRLReward has its own. Give them to TRLReward(...).")
        self.__name__ = self.reward.__name__

    async def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        return await self.reward.call_async(prompts, completions, completion_ids, **columns)


def versions_in(record: Mapping[str, Any]) -> list[str]:
    """The versions that gave the scores of a record of TRL's log, of all its rewards."""
    return sorted({key.split("/version/")[1] for key in record if "/version/" in key})


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of TRL's, taken apart."""

    inputs: list[TextInput]
    texts: list[str]
    lengths: list[int]
    columns: dict[str, Any]
    heldout: Sequence[int] | None
    step: int
    log_metric: Callable[[str, float], None] | None
    log_extra: Callable[[str, list[Any]], None] | None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None,
        columns: dict[str, Any],
    ) -> _Call:
        state = columns.pop("trainer_state", None)
        log_metric, log_extra = columns.pop("log_metric", None), columns.pop("log_extra", None)
        texts = [_text(completion) for completion in completions]
        # Without the policy's ids characters stand for its tokens.
        lengths = [len(ids) for ids in (completion_ids if completion_ids is not None else texts)]
        return cls(
            row_inputs(prompts, completions, columns),
            texts,
            lengths,
            columns,
            columns.get(HELDOUT),
            0 if state is None else int(state.global_step) + 1,
            log_metric,
            log_extra,
        )


def _text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def _append(directory: Path, call: _Call, scores: list[float], rewards: list[float], version: str) -> None:
    """One line for each completion, in a file that this process alone writes."""
    file = directory / f"samples-{os.environ.get('RANK', '0')}.jsonl"
    lines = [
        json.dumps(
            {
                "step": call.step,
                "prompt": entry.prompt,
                "completion": entry.completion,
                "score": score,
                "reward": reward,
                "version": version,
            },
            ensure_ascii=False,
        )
        for entry, score, reward in zip(call.inputs, scores, rewards, strict=True)
    ]
    with writing(file), file.open("ab+") as out:
        if out.tell() and out.seek(-1, os.SEEK_END) is not None and out.read(1) != b"\n":
            out.write(b"\n")  # a killed process left half a line
        out.write("".join(f"{line}\n" for line in lines).encode())
