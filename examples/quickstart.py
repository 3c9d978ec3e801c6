"""The whole way in one script: pairs -> trained model -> scores -> published version -> service -> rewards.

    python jobs/prepare_model.py models/smollm2-6 --layers 6
    python examples/quickstart.py --model models/smollm2-6

Trains in this process on preferences that the package generates; a few minutes on two cores. Any causal
language model or encoder that transformers knows will do, by directory or hub name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve

from rayrm import RewardConfig, RewardModel, RewardTrainer, deploy, publish
from rayrm.demo.preferences import make_preferences

QUESTION = [{"role": "user", "content": "What is the capital of Portugal?"}]
ANSWERS = ["The capital of Portugal is Lisbon.", "Go away.", "A banana, I think."]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory or hub name of the base model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="a new directory")
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args(arguments)

    train, heldout = make_preferences(options.pairs, seed=0)
    trainer = RewardTrainer(
        options.model,
        RewardConfig(
            str(options.out / "model"),
            num_train_epochs=1,
            learning_rate=1e-4,
            gradient_checkpointing=False,  # a small model needs no memory saved
            eval_strategy="epoch",
        ),
        train_dataset=train,
        eval_dataset=heldout,
    )
    trainer.train()

    # Score in this process ...
    prompts = [QUESTION] * len(ANSWERS)
    completions: list[Any] = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    here = RewardModel.from_pretrained(options.out / "model").score(prompts, completions)

    # ... or publish an immutable version and serve it to everything in the cluster.
    published = publish(options.out / "model", options.out / "registry", "quickstart")
    reward = deploy(published, "quickstart")
    served = reward(prompts=prompts, completions=completions)
    serve.delete("quickstart")

    for answer, score, same in sorted(zip(ANSWERS, here, served, strict=True), key=lambda row: -row[1]):
        print(f"{score:+.3f}  {same:+.3f}  {answer}")
    return served


if __name__ == "__main__":
    main()
