"""SkyRL: an environment of one turn whose reward is the reward service's score of the answer.

    from skyrl_gym.envs import register  # in the function that SkyRL's entry point runs by Ray
    register(id="reward", entry_point="rayrm.rl.skyrl:RewardEnv", kwargs={"service": "reward"})

and `environment.env_class=reward` in the command. Contract: skyrl_gym 0.4.0, `envs/base_text_env.py`; caller:
skyrl 0.3.0, `train/generators/skyrl_gym_generator.py`, which steps each answer's environment in a pool of
threads (`environment.skyrl_gym.max_env_workers`, 32): answers that are ready together are scored together.
With `generator.batched=true` SkyRL steps one environment after the other, a request each. An error of `step`
ends SkyRL's rollout; it makes no reward up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayrm.errors import ConfigError, MissingExtraError, ScoreError
from rayrm.rl.service import reward_service
from rayrm.serve.client import in_event_loop
from rayrm.serve.request import check_truncation

if TYPE_CHECKING:
    from rayrm.serve.request import ScoreResult, Truncation

try:
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
    from skyrl_gym.metrics import default_aggregate_metrics
except ImportError as error:
    raise MissingExtraError(
        "SkyRL's environments need skyrl_gym, which is not installed (or not whole: "
        f"{error}). Type: pip install skyrl-gym"
    ) from error


class RewardEnv(BaseTextEnv):  # type: ignore[misc]  # skyrl_gym ships no types
    """One prompt, one answer, one score.

    `prompt` is the message list of the data set, and the reward model's text form must be conversational; its
    own chat template is applied. The answer is the text as SkyRL's engine gives it, without special tokens.
    For several turns derive from it, and call `score` in your `step`.

    Args:
        env_config, extras: as SkyRL passes them; not read.
        service, model: the reward service's name, and which of its models; else `RAYRM_REWARD`,
            `RAYRM_REWARD_MODEL`.
        truncation: of a text beyond the model's positions: "left" or "right"; None: refuse.
        settings: more of `RewardClient`'s (`deadline_s`, `pin_version`, ...).
    """

    def __init__(
        self,
        env_config: Any = None,
        extras: Mapping[str, Any] | None = None,
        *,
        service: str | None = None,
        model: str | None = None,
        truncation: Truncation | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_truncation(truncation)
        self._truncation = truncation
        self._client = reward_service(service, model, **settings)
        self._prompt: list[dict[str, Any]] | None = None
        self._result: ScoreResult | None = None

    def init(self, prompt: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The prompt as it is, which the answer is scored with."""
        self._prompt = list(prompt)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """The score of `action` as the reward; the episode is done.

        `metadata`: `version` and `model` that gave the score, and whether the text was `truncated`.
        Raises what `RewardClient.score` raises.
        """
        self.turns += 1
        result = self.score([{"role": "assistant", "content": action}])
        metadata = {"version": result.version, "model": result.model, "truncated": bool(result.truncated)}
        return BaseTextEnvStepOutput(observations=[], reward=result.scores[0], done=True, metadata=metadata)

    def score(self, completion: list[dict[str, Any]]) -> ScoreResult:
        """The service's score of the messages that follow the prompt; kept for `get_metrics`."""
        if self._prompt is None:
            raise ScoreError(
                "`step` before `init`: the environment has no prompt yet. Call init(prompt) first."
            )
        if in_event_loop():
            raise ConfigError(
                "`environment.skyrl_gym.max_env_workers` (0) lets SkyRL step environments in its event loop, "
                "which a reward would block. Set it above 0 (SkyRL's default is 32)."
            )
        self._result = self._client.score([self._prompt], [completion], truncation=self._truncation)
        return self._result

    def get_metrics(self) -> dict[str, Any]:
        """The latest `score`, `latency_s`, `retries`, `truncated`, `version`, an ensemble's `spread`."""
        if self._result is None:
            return {}
        found = {
            "score": self._result.scores[0],
            "latency_s": self._result.timing.total_s,
            "retries": self._result.retries,
            "truncated": bool(self._result.truncated),
            "version": self._result.version,
        }
        return found if self._result.spread is None else {**found, "spread": self._result.spread[0]}

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Means of the numbers, and `version/<version>`: the share of answers that this version scored."""
        found: dict[str, Any] = default_aggregate_metrics(metrics)
        versions = [entry["version"] for entry in metrics if "version" in entry]
        return {**found, **{f"version/{one}": versions.count(one) / len(versions) for one in set(versions)}}
