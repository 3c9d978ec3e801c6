"""OpenRLHF's Python reward file: `--reward.remote_url DIRECTORY/rayrm/rl/openrlhf.py`, scored by the service.

OpenRLHF loads this file in each rollout engine and calls `reward_func` in threads, with one query a call;
calls that arrive together travel together. A query is the whole text as the policy saw and wrote it, special
tokens included, and is scored as rendered text, with what the reward model's chat template writes after the
end-of-turn token. It passes no settings: the environment variables of
`service.py` name the service and its model (`ray job submit --runtime-env-json '{"env_vars": {...}}'`).
Where this file is: `python -c 'import rayrm.rl.openrlhf as f; print(f.__file__)'`. By HTTP the same scores
come from `/get_reward`, but there OpenRLHF goes on without the reward of a call that failed. Contract:
OpenRLHF 0.11.2, `utils/agent.py` (`SingleTurnAgentExecutor`), `trainer/ppo_utils/samples_generator.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rayrm.data.tokenize import TextInput
from rayrm.rl.service import reward_service
from rayrm.serve.request import check_none_refused
from rayrm.serve.wire import whole_texts

logger = logging.getLogger(__name__)

_told: set[str] = set()


class RewardLost(BaseException):
    """There is no reward, for the reason told. Its cause is the service's own error.

    Not an `Exception`: OpenRLHF catches each of those, logs it as information and trains on without the
    reward. This one ends the rollout, and `ray.get` raises it in OpenRLHF's driver.
    """


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **columns: Any
) -> dict[str, Any]:
    """OpenRLHF's reward function: `rewards` and `scores`, float32 `[num_queries]`, and `extra_logs`.

    Args:
        queries: whole texts, prompt and response.
        prompts, labels, columns: a learned reward reads none of them.

    `extra_logs` has for each query `reward_retries` of its call, and `reward_spread` of an ensemble. OpenRLHF
    logs numbers alone, so a version that is new to this process is told in its log.

    Raises:
        RewardLost: a text that cannot be scored, or no answer before the deadline.
    """
    try:
        inputs = whole_texts("queries", list(queries), complete_turn=True)
        check_none_refused(inputs)
        result = reward_service().score_inputs([text for text in inputs if isinstance(text, TextInput)])
    except Exception as error:  # whatever it is, OpenRLHF would go on without it
        raise RewardLost(f"{type(error).__name__}: {error}") from error
    if result.version not in _told:
        _told.add(result.version)
        logger.warning("rewards come from version %s of %s", result.version, result.model)
    scores = torch.tensor(result.scores, dtype=torch.float32)
    logs = {"reward_retries": torch.full_like(scores, result.retries)}
    if result.spread is not None:
        logs["reward_spread"] = torch.tensor(result.spread, dtype=torch.float32)
    return {"rewards": scores, "scores": scores, "extra_logs": logs}
