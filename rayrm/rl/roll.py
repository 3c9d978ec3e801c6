"""ROLL: a reward worker whose rewards are the reward service's scores.

    rewards:
      preference:  # a domain of the data
        worker_cls: rayrm.rl.roll.RewardWorker
        system_envs: {RAYRM_REWARD: reward}
        tag_included: [...]
        world_size: 2

Contract: alibaba/ROLL at 8eb27cc2, `roll/distributed/executor/{worker,cluster}.py`,
`roll/distributed/scheduler/decorator.py`, `roll/pipeline/rlvr/rlvr_config.py`; callers: `compute_rewards` of
`roll/distributed/scheduler/generate_scheduler.py` (for each prompt's answers, many at the same time: the
worker answers them so, and they travel together) and of `reward_scheduler.py`. An error of `compute_rewards`
ends the rollout; ROLL's own remote worker takes 0 where its server fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rayrm.errors import MissingExtraError, ScoreError
from rayrm.rl.service import figures_of, reward_service

if TYPE_CHECKING:
    from rayrm.serve.request import Truncation

try:
    from roll.distributed.executor.worker import Worker
    from roll.distributed.scheduler.decorator import Dispatch, register
    from roll.distributed.scheduler.protocol import DataProto
    from roll.models.model_providers import default_tokenizer_provider
except ImportError as error:
    raise MissingExtraError(
        f"ROLL is not installed here, or not whole ({error}). Run inside a checkout of "
        "https://github.com/alibaba/ROLL, with rayrm beside it: pip install rayrm (PyPI's roll is another "
        "project)."
    ) from error


class RewardWorker(Worker):  # type: ignore[misc]  # ROLL ships no types
    """Scores each (prompt, response) of a batch.

    Service and model are `RAYRM_REWARD` and `RAYRM_REWARD_MODEL` of the worker's `system_envs`. The prompt is
    the row's `messages`, and then the reward model's text form must be conversational; else its `prompt`, as
    plain text: the columns that ROLL itself makes its prompts of (`data_args.messages`, `data_args.prompt`).
    The response is decoded by the policy's tokenizer, without special tokens. `truncation` is of a text
    beyond the reward model's positions, else refused: derive from this class to set "left" or "right".
    """

    truncation: Truncation | None = None

    def __init__(self, worker_config: Any) -> None:
        super().__init__(worker_config=worker_config)
        # Every worker has a share of the batch of its own.
        self.rank_info.dp_rank = self.rank_info.rank
        self.rank_info.dp_size = self.rank_info.world_size
        self._client = reward_service()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def initialize(self, pipeline_config: Any) -> None:
        """Take the policy's tokenizer and the names of the data's columns."""
        super().initialize(pipeline_config)
        policy = pipeline_config.actor_train
        self._tokenizer = default_tokenizer_provider(model_args=policy.model_args)
        self._messages = getattr(policy.data_args, "messages", None) or "messages"
        self._prompt = getattr(policy.data_args, "prompt", None) or "prompt"

    @register(dispatch_mode=Dispatch.DP_MP_COMPUTE, clear_cache=False)  # type: ignore[untyped-decorator]
    async def compute_rewards(self, data: Any) -> Any:
        """A DataProto of B rows: `response_level_rewards` and `scores`, float32 `[B]`, and
        `token_level_rewards`, zeros as `responses`; its meta_info has `metrics`.

        Raises ScoreError (rows with neither column, a text that cannot be scored), RewardUnavailableError.
        """
        responses = data.batch["responses"]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        prompts, completions = self._inputs(data.non_tensor_batch, texts)
        result = await self._client.score_async(prompts, completions, truncation=self.truncation)
        scores = torch.tensor(result.scores, dtype=torch.float32)
        output = DataProto.from_dict(
            tensors={
                "token_level_rewards": torch.zeros_like(responses, dtype=torch.float32),
                "response_level_rewards": scores,
                "scores": scores.clone(),
            }
        )
        output.meta_info = {
            "metrics": {f"{self._client.name}/{key}": value for key, value in figures_of(result).items()}
        }
        return output

    def _inputs(self, rows: Any, texts: Sequence[str]) -> tuple[list[Any], list[Any]]:
        if self._messages in rows:
            prompts = [
                json.loads(entry) if isinstance(entry, str) else list(entry) for entry in rows[self._messages]
            ]
            return prompts, [[{"role": "assistant", "content": text}] for text in texts]
        if self._prompt in rows:
            return [str(entry) for entry in rows[self._prompt]], list(texts)
        raise ScoreError(
            f"the batch has neither `{self._messages}` nor `{self._prompt}` (it has "
            f"{', '.join(sorted(rows.keys())) or 'none'}). Name the data's column: "
            "actor_train.data_args.messages, or actor_train.data_args.prompt."
        )
