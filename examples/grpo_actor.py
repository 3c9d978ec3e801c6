"""GRPO in a Ray actor whose only reward is the deployed reward model: TRL's trainer, nothing wrapped.

    python examples/grpo_actor.py --policy DIR --reward reward --steps 4
    python examples/grpo_actor.py --policy DIR --reward registry/helpful --steps 4

`--reward` is the name of a running service (`rayrm serve`), or a published model, which is then served for
the length of this run. `--policy` is a causal language model with a chat template. Needs: pip install
'rayrm[trl]'.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from rayrm import RewardClient, deploy
from rayrm.serve.connect import connect

QUESTIONS = [
    "How do I say no to a friend politely?",
    "Explain what a rainbow is in one sentence.",
    "My train is late. What should I tell my boss?",
    "Name three things to take on a hike.",
]


@ray.remote(num_cpus=1)
class PolicyActor:
    """Holds the policy. A `RewardClient` is a few bytes: the reward model stays in its replica."""

    def train(self, policy: str, reward: RewardClient, steps: int) -> list[dict[str, Any]]:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
        with tempfile.TemporaryDirectory() as directory:
            trainer = GRPOTrainer(
                model=policy,
                reward_funcs=reward,  # the client is TRL's reward function
                args=GRPOConfig(
                    output_dir=directory,
                    max_steps=steps,
                    per_device_train_batch_size=8,  # 2 prompts x 4 completions
                    num_generations=4,
                    max_completion_length=32,
                    learning_rate=1e-5,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                ),
                train_dataset=Dataset.from_list(prompts),
            )
            trainer.train()
        return [entry for entry in trainer.state.log_history if "reward" in entry]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="directory or hub name of a causal language model")
    parser.add_argument(
        "--reward", default="reward", help="name of a service, or a published model's directory"
    )
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)

    connect()
    serve_here = Path(options.reward).is_dir()
    reward = deploy(options.reward, "grpo-reward") if serve_here else RewardClient(options.reward)
    try:
        actor = PolicyActor.remote()
        log = ray.get(actor.train.remote(options.policy, reward, options.steps))
    finally:
        if serve_here:
            serve.delete("grpo-reward")
    for step, entry in enumerate(log, start=1):
        print(f"step {step}: reward {entry['reward']:+.4f} (std {entry['reward_std']:.4f})")
    return log


if __name__ == "__main__":
    main()
