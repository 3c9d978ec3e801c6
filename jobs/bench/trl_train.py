"""A plain TRL run: load, tokenize, train, save. What `e2e.py` times, in a process of its own.

python jobs/bench/trl_train.py MODEL PAIRS.jsonl OUTPUT_DIR '{"max_length": 1024, ...}'
"""

from __future__ import annotations

import json
import sys

from datasets import load_dataset
from trl import RewardConfig, RewardTrainer


def main(model: str, pairs: str, output_dir: str, settings: str) -> None:
    """Train `model` on the rows of `pairs`, in their order, and save it."""
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir, train_sampling_strategy="sequential", disable_tqdm=True, **json.loads(settings)
        ),
        train_dataset=load_dataset("json", data_files=pairs, split="train"),
    )
    trainer.train()
    trainer.save_model(output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
