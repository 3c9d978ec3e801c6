"""A reward service beside the actors that call it, sharing a GPU with the policy; on a CPU, sharing CPUs.

    python examples/colocated.py MODEL

MODEL: a run's directory or a published model. Each replica reserves a fifth of a GPU (`num_gpus`), and its
node's policies the rest. Ray's fractions are bookkeeping, not limits: what keeps the memory apart is
`max_tokens_per_batch` here and the policy's own settings there. `idle_offload_s` moves the reward model's
weights to CPU memory while the policy generates and trains; `prefer_local=True` lets an actor ask the replica
on its own node first.
"""

from __future__ import annotations

import sys

import ray
import torch

from rayrm import RewardClient, deploy
from rayrm.serve.connect import connect
from rayrm.serve_commands import model_directory

GPU = torch.cuda.is_available()
PROMPTS = ["What is two and two?", "Name a colour."]
COMPLETIONS = ["Four.", "Blue."]


@ray.remote(num_cpus=0.5, num_gpus=0.8 if GPU else 0)
class Policy:
    """Stands for a policy: what it would generate is written here."""

    def __init__(self, reward: RewardClient, conversational: bool) -> None:
        self._reward = reward
        self._conversational = conversational

    def step(self) -> tuple[list[float], str]:
        """One group is scored by one version, whatever is rolled meanwhile."""
        if self._conversational:
            prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
            completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
            answer = self._reward.score(prompts, completions)
        else:
            answer = self._reward.score(PROMPTS, COMPLETIONS)
        return answer.scores, answer.version


def main(model: str) -> None:
    from ray import serve

    from rayrm.serve.saved import saved_files

    directory = model_directory(model, "registry")  # of a published name, its current version
    conversational = saved_files(directory).text_form == "conversational"
    connect()
    reward = deploy(
        directory,
        "colocated",
        placement_group_bundles=[{"CPU": 0.5, "GPU": 0.2} if GPU else {"CPU": 0.5}],
        num_cpus=0.5,
        num_gpus=0.2 if GPU else 0,
        idle_offload_s=5,
    )
    try:
        nearby = RewardClient("colocated", model=reward.model, prefer_local=True)
        policies = [Policy.remote(nearby, conversational) for _ in range(2)]  # type: ignore[attr-defined]
        for scores, version in ray.get([policy.step.remote() for policy in policies]):
            print(f"{version}: {', '.join(f'{score:.4f}' for score in scores)}")
    finally:
        serve.delete("colocated")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
