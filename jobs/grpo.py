"""Train a policy by GRPO with the deployed reward model as its only reward.

    ray job submit --working-dir . -- python jobs/grpo.py --policy DIR --prompts prompts.jsonl --steps 100

Each line of the prompts file is an object with the key `prompt`: a string or a message list. The service must
run (`rayrm serve`, or jobs/serve.py as another job).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rayrm.errors import RayrmError
from rayrm.rl.grpo import run_grpo
from rayrm.serve.client import RewardClient
from rayrm.serve.connect import connect

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="directory or hub name of a causal language model")
    parser.add_argument("--prompts", required=True, type=Path, help="jsonl with the key `prompt`")
    parser.add_argument("--reward", default="reward", help="name of the service")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--num-gpus", type=float, default=0.0, help="GPUs for the policy")
    parser.add_argument("--output-dir", type=Path, help="where the trained policy is saved")
    options = parser.parse_args()
    try:
        prompts = [json.loads(line)["prompt"] for line in options.prompts.read_text().splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        sys.exit(f"error: {options.prompts} cannot be read as jsonl with the key `prompt`: {problem!r}")
    connect()
    try:
        steps = run_grpo(
            options.policy,
            RewardClient(options.reward),
            prompts,
            options.steps,
            num_gpus=options.num_gpus,
            output_dir=options.output_dir,
        )
    except RayrmError as error:
        sys.exit(f"error: {error}")
    for number, step in enumerate(steps, start=1):
        print(f"step {number}: reward {step['reward']:+.4f} (std {step['reward_std']:.4f})")
