"""verl's reward from the reward service: a manager that sees each rollout's prompt, and `compute_score`.

verl 0.9 asks for one sample a call, in the event loops of its reward workers; calls that arrive together
travel together. Its default trainer (`trainer.use_v1=true`) shows a reward function no prompt; a reward
manager finds it as `raw_prompt`, in every trainer:

    reward.reward_manager.source=importlib reward.reward_manager.name=ServiceReward
    reward.reward_manager.module.path=pkg://rayrm.rl.verl +reward.reward_kwargs.service=helpful

The older trainer puts `raw_prompt` into `extra_info`, where a reward function finds it; both give it the data
set's own `extra_info`, in which `prompt_key` names the prompt:

    reward.custom_reward_function.path=pkg://rayrm.rl.verl reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.prompt_key=question

Beware: verl's default trainer does not end on a failed reward. It logs the error, marks the prompt as failed
and trains on without those trajectories (padded); only a batch without any ends it. Set a `deadline_s` longer
than any outage, and `trainer.v1.sampler.sync_refill_failed_groups=True`, which replaces a prompt all of whose
trajectories failed (it needs `gen_batch_size=1`; `trainer/ppo/v1/{agent_loop_tq,replay_buffer}.py`).

Without `service` and `model` the environment variables of `service.py` say them. Contract: verl 0.9.1,
`experimental/reward_loop/reward_manager/naive.py` (the call), `trainer/ppo/reward.py` (the loading),
`experimental/agent_loop/agent_loop.py` (`raw_prompt`), `trainer/ppo/v1/agent_loop_tq.py` (its absence).
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from rayrm.data.messages import Text, answer_to
from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.service import reward_service
from rayrm.serve.request import Truncation
from rayrm.settings import nearest

RAW_PROMPT = "raw_prompt"
"""verl's name for the messages that a rollout began with."""
_KEYWORDS = ("service", "model", "prompt_key", "truncation", "deadline_s", "pin_version")
"""What `reward.reward_kwargs` may say to ServiceReward."""


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    service: str | None = None,
    model: str | None = None,
    prompt_key: str = RAW_PROMPT,
    truncation: Truncation | None = None,
    deadline_s: float = 120.0,
    pin_version: str | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, Any]:
    """verl's reward function: `score` of one response, the `version` that gave it, an ensemble's `spread`.

    Args:
        solution_str: the response, decoded without special tokens.
        extra_info: holds the prompt under `prompt_key`: a string, or messages, which the response answers.
        service, model: as `reward_service`.
        truncation: as `RewardClient.score`; None: a text beyond the model's positions is an error.
        deadline_s, pin_version: as `RewardClient`.
        data_source, ground_truth: verl sends them; a learned reward reads neither.
        reward_router_address, reward_model_tokenizer: verl sends them where its own reward model runs too.

    Raises:
        ScoreError: there is no prompt, or a text that cannot be scored.
        RewardUnavailableError: no such application, or no answer before the deadline.
    """
    client = reward_service(service, model, deadline_s=deadline_s, pin_version=pin_version)
    prompt = _prompt(extra_info or {}, prompt_key)
    answer = answer_to(prompt, solution_str)
    result = await client.score_async([prompt], [answer], truncation=truncation)
    reward: dict[str, Any] = {"score": result.scores[0], "version": result.version}
    if result.spread is not None:
        reward["spread"] = result.spread[0]
    return reward


class ServiceReward:
    """verl's reward manager contract: `compute_score` of each rollout's `raw_prompt` and response.

    `config.reward.reward_kwargs`: `compute_score`'s keywords. The rollout's `raw_prompt` stands beside the
    data set's own `extra_info`. Raises ConfigError beside a custom reward function, which it would not call.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        custom = (config.reward.get("custom_reward_function") or {}).get("path")
        if custom:
            raise ConfigError(
                f"`reward.custom_reward_function.path` ({custom}) beside the reward manager ServiceReward, "
                "which asks the reward service alone. Remove one of the two."
            )
        self._tokenizer = tokenizer
        self._settings = dict(config.reward.get("reward_kwargs") or {})
        for name in self._settings:
            if name not in _KEYWORDS:
                raise ConfigError(
                    f"`reward.reward_kwargs.{name}` is unknown.{nearest(str(name), _KEYWORDS)} "
                    f"ServiceReward takes {', '.join(_KEYWORDS)}."
                )

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of the last sequence of `data` (a `DataProto` of one rollout), with its version.

        verl reads `reward_score` and logs the rest from `reward_extra_info`. Raises as `compute_score`.
        """
        row = data[len(data) - 1]
        response_ids = row.batch["responses"]
        length = int(row.batch["attention_mask"][-response_ids.shape[-1] :].sum())
        response = await asyncio.to_thread(
            self._tokenizer.decode, response_ids[:length], skip_special_tokens=True
        )
        fields = row.non_tensor_batch
        extra = dict(fields.get("extra_info") or {})
        if fields.get(RAW_PROMPT) is not None:
            extra[RAW_PROMPT] = fields[RAW_PROMPT]
        reward = await compute_score(fields.get("data_source", ""), response, None, extra, **self._settings)
        return {"reward_score": reward["score"], "reward_extra_info": reward}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Any:
        """verl's own placing of rewards: `[num_responses, response_length]`, each at its last token."""
        place = importlib.import_module("verl.experimental.reward_loop.reward_manager.base")
        return place.RewardManagerBase.assemble_rm_scores(data, scores)


def _prompt(extra_info: Mapping[str, Any], key: str) -> Text:
    """The prompt as text or messages; verl keeps messages in numpy arrays of dicts too."""
    found = extra_info.get(key)
    if isinstance(found, str):
        return found
    if found is not None and len(found):
        return [dict(message) for message in found]
    why = (
        "verl's default trainer shows it to a reward manager alone: set reward.reward_manager.source="
        "importlib reward.reward_manager.name=ServiceReward reward.reward_manager.module.path="
        "pkg://rayrm.rl.verl, or name the data set's own key by reward_kwargs.prompt_key"
        if key == RAW_PROMPT
        else "name a key that the data set has, a string or messages"
    )
    raise ScoreError(
        f"`extra_info[{key!r}]` is missing, and a reward is of a prompt and its response (the keys here: "
        f"{', '.join(map(str, extra_info)) or 'none'}). Fix: {why}."
    )
