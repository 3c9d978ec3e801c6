"""A TRL reward-training script, moved to rayrm by its import line; `--workers` spreads it over Ray workers.

    python examples/trl_migration.py --model models/smollm2-6 --data data/pairs.jsonl --workers 2

With TRL the script began with `from trl import RewardConfig, RewardTrainer`; all else but the
marked line is what it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import load_dataset
from peft import LoraConfig

from rayrm import RewardConfig, RewardTrainer


def main(arguments: Sequence[str] | None = None) -> RewardTrainer:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", default="runs/migrated")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(arguments)

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    trainer = RewardTrainer(
        model=options.model,
        args=RewardConfig(
            output_dir=options.output_dir,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            max_steps=options.max_steps,
            center_rewards_coefficient=0.01,
            eval_strategy="epoch",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=LoraConfig(task_type="SEQ_CLS", r=16),
        scaling_config=scaling(options.workers),  # the one argument that TRL does not have
    )
    trainer.train()
    print(trainer.evaluate())
    return trainer


def scaling(workers: int) -> object:
    """Ray Train's own configuration; None trains in this process."""
    if workers == 0:
        return None
    from ray.train import ScalingConfig

    return ScalingConfig(num_workers=workers)


if __name__ == "__main__":
    main()
