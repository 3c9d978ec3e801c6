"""[RAY] TRL's GRPO in a Ray actor whose only reward is the reward service.

`train_grpo` trains in this process; `run_grpo` does the same in an actor of the cluster, beside the replicas
that score. Both return one dict of numbers for each step. A reward is a number from the service or the run
ends with the service's error. This is the short way: for a training of your own give a `RewardClient` to any
`GRPOTrainer` as `reward_funcs` (see examples/grpo_actor.py).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayrm.data.messages import Text
from rayrm.errors import ConfigError, MissingExtraError, RayrmError

Reward = Callable[..., list[float]]


def train_grpo(
    policy: str | Path,
    reward: Reward,
    prompts: Sequence[Text],
    steps: int,
    *,
    output_dir: str | Path | None = None,
    num_generations: int = 4,
    prompts_per_step: int = 2,
    max_completion_length: int = 32,
    **config: Any,
) -> list[dict[str, float]]:
    """Train `policy` (a directory or hub name) for `steps` optimizer steps; one dict of numbers for each.

    Args:
        reward: a `RewardClient`, or any TRL reward function.
        prompts: strings or message lists; the reward model's text form must be the same.
        output_dir: where the trained policy is saved; None: it is not kept.
        num_generations: completions for each prompt, compared with each other.
        prompts_per_step: prompts for each optimizer step.
        config: more fields of TRL's `GRPOConfig` (`learning_rate`, `temperature`, `beta`, `seed`, ...).

    Raises:
        MissingExtraError: TRL is not installed.
        ScoreError, RewardUnavailableError: as the reward raised it.
    """
    _require_trl()
    if not prompts:
        raise ConfigError("`prompts` ([]) holds no prompt. Pass at least one, as a string or a message list.")
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory(prefix="grpo-") as scratch:
        settings: dict[str, Any] = {
            "output_dir": str(output_dir or scratch),
            "max_steps": steps,
            "num_generations": num_generations,
            "per_device_train_batch_size": num_generations * prompts_per_step,
            "max_completion_length": max_completion_length,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **_precision(),
            **config,
        }
        trainer = GRPOTrainer(
            model=str(policy),
            reward_funcs=reward,
            args=GRPOConfig(**settings),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=AutoTokenizer.from_pretrained(str(policy), padding_side="left"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if output_dir is not None:
            trainer.save_model(str(output_dir))
        return [_numbers(entry) for entry in trainer.state.log_history if "reward" in entry]


def run_grpo(
    policy: str | Path,
    reward_client: Reward,
    prompts: Sequence[Text],
    steps: int,
    *,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    **settings: Any,
) -> list[dict[str, float]]:
    """`train_grpo(policy, reward_client, prompts, steps, **settings)` in a Ray actor; returns its step logs.

    `num_cpus`, `num_gpus` are what the actor reserves. Raises what `train_grpo` raises.
    """
    _require_trl()
    place = Path(policy)
    source = str(place.resolve()) if place.exists() else str(policy)
    if settings.get("output_dir") is not None:
        settings["output_dir"] = str(Path(settings["output_dir"]).resolve())
    actor = ray.remote(_PolicyActor).options(num_cpus=num_cpus, num_gpus=num_gpus).remote()
    try:
        logs: list[dict[str, float]] = ray.get(
            actor.train.remote(source, reward_client, list(prompts), steps, settings)
        )
    except RayTaskError as error:
        if isinstance(error.cause, RayrmError):
            raise error.cause from error
        raise
    finally:
        ray.kill(actor)
    return logs


class _PolicyActor:
    """The process that holds the policy."""

    def train(
        self, policy: str, reward: Reward, prompts: list[Text], steps: int, settings: dict[str, Any]
    ) -> list[dict[str, float]]:
        return train_grpo(policy, reward, prompts, steps, **settings)


def _require_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        raise MissingExtraError("GRPO needs TRL, which is not installed. Type: pip install 'rayrm[trl]'")


def _precision() -> dict[str, Any]:
    """bf16 where the hardware computes it; else float32, on the CPU where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"use_cpu": True, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}
    return {"bf16": torch.cuda.is_bf16_supported()}


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
