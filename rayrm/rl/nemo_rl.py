"""[RAY] NeMo-RL: an environment actor whose rewards are the reward service's scores.

    from rayrm.rl import nemo_rl  # in the script that starts the run, before its data is set up
    nemo_rl.register("reward")

and in the configuration

    data: {default: {env_name: reward}}
    env: {reward: {service: reward, end: "<|im_end|>\\n"}}

Contract: NVIDIA-NeMo/RL at 7ea279ab, `nemo_rl/environments/{interfaces,utils}.py`; caller:
`calculate_rewards` of `nemo_rl/experience/rollouts.py`, which asks for a batch at once, or, in asynchronous
rollouts, for each sample: the actor answers them at the same time, and they travel together. An error of
`step` ends NeMo-RL's rollout; it makes no reward up.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch

from rayrm.errors import ConfigError, MissingExtraError, ScoreError
from rayrm.rl.service import reward_service
from rayrm.serve.request import check_truncation

if TYPE_CHECKING:
    from rayrm.serve.client import RewardClient
    from rayrm.serve.request import ScoreResult, Truncation


class _Return(NamedTuple):
    """NeMo-RL's `EnvironmentReturn`, where it is not installed. All fields are of a batch of B samples.

    `observations`: B messages. `metadata`: B, of any kind. `next_stop_strings`: B. `rewards`: float32 `[B]`.
    `terminateds`: bool `[B]`. `answers`: B texts.
    """

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[str | None] | None


try:
    from nemo_rl.environments.interfaces import EnvironmentReturn
except ImportError:  # the actor may run, and be tested, where NeMo-RL is not; PyPI's nemo_rl is a placeholder
    EnvironmentReturn = _Return

_SETTINGS = (
    "service",
    "model",
    "end",
    "truncation",
    "deadline_s",
    "pin_version",
    "hedge_after_s",
    "prefer_local",
)


class RewardEnvironmentActor:
    """One prompt, one answer, one score.

    What is scored: where a sample's metadata (its processor's `extra_env_info`) has `messages`, these as the
    prompt and the answer as a message, by the reward model's own chat template. Else NeMo-RL's processors
    have left text in the message log to which the policy's template has been applied: it is scored as it
    stands, followed by `end`, what that template writes after an answer ("<|im_end|>\\n" for ChatML), since
    NeMo-RL takes special tokens out of answers and a reward model is trained to score at that end. That is
    right only where policy and reward model have one template.

    Args:
        config: of the run's `env.NAME`: `service`, `model` (else `RAYRM_REWARD`, `RAYRM_REWARD_MODEL`), `end`
            ("" for a reward model of plain text), `truncation` (of a text beyond the model's positions:
            "left" or "right"), and `RewardClient`'s `deadline_s`, `pin_version`, `hedge_after_s`,
            `prefer_local`.

    Raises ConfigError for any other key.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        settings = dict(config or {})
        if unknown := sorted(set(settings) - set(_SETTINGS)):
            raise ConfigError(
                f"`{unknown[0]}` ({settings[unknown[0]]!r}) is no setting of the reward environment. It has "
                f"{', '.join(_SETTINGS)}."
            )
        self._end: str | None = settings.pop("end", None)
        if not isinstance(self._end, str | None):
            raise ConfigError(f'`end` ({self._end!r}) must be text, such as "<|im_end|>\\n".')
        self._truncation: Truncation | None = settings.pop("truncation", None)
        check_truncation(self._truncation)
        self._client: RewardClient = reward_service(
            settings.pop("service", None), settings.pop("model", None), **settings
        )
        self._seen = _Seen()

    async def step(
        self,
        message_log_batch: Sequence[Sequence[Mapping[str, Any]]],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Any:
        """The score of each sample's last answer, as an `EnvironmentReturn`; every episode ends.

        Raises ScoreError (a log without an answer at its end, a text that cannot be scored),
        RewardUnavailableError.
        """
        answers = [_answer(place, log) for place, log in enumerate(message_log_batch)]
        told: dict[int, Any] = {
            place: row["messages"]
            for place, row in enumerate(metadata)
            if row is not None and row.get("messages") is not None
        }
        others = [place for place in range(len(answers)) if place not in told]
        scores = torch.zeros(len(answers), dtype=torch.float32)
        if told:
            result = await self._client.score_async(
                list(told.values()),
                [[{"role": "assistant", "content": answers[place]}] for place in told],
                truncation=self._truncation,
            )
            scores[list(told)] = torch.tensor(result.scores)
            self._seen.add(result)
        if others:
            result = await self._client.score_async(
                [_before(message_log_batch[place]) for place in others],
                [answers[place] + self._ending() for place in others],
                rendered=True,
                truncation=self._truncation,
            )
            scores[others] = torch.tensor(result.scores)
            self._seen.add(result)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in answers],
            metadata=list(metadata),
            next_stop_strings=[None] * len(answers),
            rewards=scores,
            terminateds=torch.ones(len(answers), dtype=torch.bool),
            answers=list(answers),
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The batch as it is, and its rewards' `reward_mean` and so on; no reward is changed.

        Beside them what this actor saw since the last call: `latency_s`, `retries`, the share `truncated`, an
        ensemble's mean `spread`, and `version/<version>`, the share of texts that this version scored.
        """
        found = self._seen.told()
        self._seen = _Seen()
        rewards = batch.get("rewards", batch.get("total_reward"))
        if isinstance(rewards, torch.Tensor) and rewards.numel() > 0:
            values = rewards.float()
            found |= {
                "reward_mean": values.mean().item(),
                "reward_std": values.std(unbiased=False).item(),
                "reward_min": values.min().item(),
                "reward_max": values.max().item(),
            }
        return batch, found

    def shutdown(self) -> None:
        """Nothing is held here: the service serves on."""

    def _ending(self) -> str:
        if self._end is None:
            raise ConfigError(
                "`env.NAME.end` is missing: samples have no `messages` in their metadata, so NeMo-RL's text "
                "is scored, and it lacks what the policy's chat template writes after an answer. Write it, "
                'such as end: "<|im_end|>\\n" ("" for a reward model of plain text), or let the data\'s '
                'processor put the prompt\'s message list into extra_env_info["messages"].'
            )
        return self._end


class _Seen:
    """What the service's answers said, since the latest report."""

    def __init__(self) -> None:
        self._versions: Counter[str] = Counter()
        self._num_requests = 0
        self._num_truncated = 0
        self._retries = 0
        self._latency_s = 0.0
        self._spreads: list[float] = []

    def add(self, result: ScoreResult) -> None:
        self._versions[result.version] += len(result.scores)
        self._num_requests += 1
        self._num_truncated += len(result.truncated)
        self._retries += result.retries
        self._latency_s += result.timing.total_s
        self._spreads += result.spread or []

    def told(self) -> dict[str, float]:
        num_texts = self._versions.total()
        if num_texts == 0:
            return {}
        found = {
            "latency_s": self._latency_s / self._num_requests,
            "retries": float(self._retries),
            "truncated": self._num_truncated / num_texts,
            **{f"version/{one}": count / num_texts for one, count in sorted(self._versions.items())},
        }
        return {**found, "spread": sum(self._spreads) / len(self._spreads)} if self._spreads else found


RewardEnvironment = ray.remote(max_restarts=-1, max_task_retries=-1)(RewardEnvironmentActor)
"""The actor class by its name in NeMo-RL's registry. Scoring twice gives the same score: a step that was lost
with the actor is sent again."""


def register(name: str = "reward") -> None:
    """Let NeMo-RL's configuration call the environment `name`; it runs in the Python of the driver.

    Raises MissingExtraError without NeMo-RL, and NeMo-RL's ValueError for a name that is taken.
    """
    try:
        environments: Any = importlib.import_module("nemo_rl.environments.utils")
        actors: Any = importlib.import_module("nemo_rl.distributed.ray_actor_environment_registry")
        clusters: Any = importlib.import_module("nemo_rl.distributed.virtual_cluster")
    except ImportError as error:
        raise MissingExtraError(
            f"NeMo-RL is not installed here, or not whole ({error}). Run inside a checkout of "
            "https://github.com/NVIDIA-NeMo/RL, with rayrm beside it: uv pip install rayrm (PyPI's nemo_rl "
            "is a placeholder)."
        ) from error
    actor = f"{__name__}.RewardEnvironment"
    environments.register_env(name, actor)
    # Without an entry here NeMo-RL refuses to start the actor.
    actors.ACTOR_ENVIRONMENT_REGISTRY[actor] = clusters.PY_EXECUTABLES.SYSTEM


def _answer(place: int, log: Sequence[Mapping[str, Any]]) -> str:
    if not log or log[-1].get("role") != "assistant" or not isinstance(log[-1].get("content"), str):
        raise ScoreError(
            f"message_log_batch[{place}] does not end with the text of an answer (role assistant): there is "
            "nothing to score. This environment is for text of one turn."
        )
    return str(log[-1]["content"])


def _before(log: Sequence[Mapping[str, Any]]) -> str:
    return "".join(str(message["content"]) for message in log[:-1])
