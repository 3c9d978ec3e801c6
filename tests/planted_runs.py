"""Run and evaluation directories as training and `rayrm evaluate` leave them, with planted numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.metrics.intervals import wilson_interval
from rayrm.metrics.outcomes import Outcomes
from rayrm.train.evaluation_record import EvaluationRecord, SetEvaluation, of_outcomes, write_evaluation

EVIL = (
    '<script>alert("x")</script><img src="http://evil.example/x.png"> \u202eright to left\u202c '
    "``` ~~~ | *a*\n# no title\n"
)


def planted_outcomes(
    num: int = 800,
    *,
    groups: Sequence[str] = ("chat", "code", "math"),
    seed: int = 0,
    skill: float = 1.0,
    by_length: float = 0.0,
) -> Outcomes:
    """Margins around `skill`, and `by_length` of score for 100 tokens.

    Rows, prompts, lengths and luck go by `seed` alone: models of another skill have the same comparisons.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 600, (2, num))
    scores = rng.standard_normal((2, num)) + by_length * lengths / 100
    return Outcomes(
        scores[0] + skill,
        scores[1],
        lengths[0],
        lengths[1],
        np.ones(num),
        np.arange(num),
        np.arange(num, dtype=np.uint64),
        np.arange(num) % len(groups),
        tuple(groups),
    )


def constant(outcomes: Outcomes, score: float) -> Outcomes:
    """The same comparisons by a model that gives every completion one score."""
    same = np.full(len(outcomes.row), score)
    return replace(outcomes, won=same, lost=same)


def measured(outcomes: Outcomes) -> SetEvaluation:
    """What `rayrm evaluate` finds of such outcomes, with texts that would break a page."""
    margin, count = outcomes.margin, len(outcomes.row)
    right = float((margin > 0).sum())
    low, high = wilson_interval(right, count)
    metrics = {
        "loss": float(np.log1p(np.exp(-margin)).mean()),
        "accuracy": right / count,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": float((margin == 0).mean()),
        "margin": float(margin.mean()),
        "length_baseline_accuracy": float((outcomes.won_length > outcomes.lost_length).mean()),
        "num_pairs": float(count),
        "num_rows": float(count),
    }
    worst = [
        {
            "where": f"pairs.jsonl:{place + 1}",
            "group": outcomes.groups[outcomes.group[place]],
            "margin": float(margin[place]),
            "chosen_score": float(outcomes.won[place]),
            "rejected_score": float(outcomes.lost[place]),
            "prompt": f"{EVIL} question {place}",
            "chosen": "word " * 30 + "x" * 3000,
            "rejected": f"second {EVIL}",
        }
        for place in np.argsort(margin)[:20].tolist()
        if margin[place] <= 0
    ]
    return of_outcomes(metrics, outcomes, worst)


def write_planted(directory: Path, sets: dict[str, Outcomes], findings: Sequence[str] = ()) -> Path:
    """An evaluation's directory, by the writer of `rayrm evaluate`; `findings` are told of every set."""
    found = {name: replace(measured(one), findings=list(findings)) for name, one in sets.items()}
    write_evaluation(EvaluationRecord("runs/first", found, "3f2a91bc04de", created="2026-01-02"), directory)
    return directory


def records(
    steps: int, *, every: int = 5, sets: Sequence[str] = ("",), seed: int = 0
) -> list[dict[str, Any]]:
    """A run's log: 16 pairs of 100 tokens a step at 200 pairs a second, a quarter of the tokens shared."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise = rng.standard_normal(6).tolist()
        accuracy = 0.5 + 0.3 * (1 - math.exp(-step / 30))
        made.append(
            {
                "step": step,
                "loss": 0.69 - 0.3 * (accuracy - 0.5) / 0.3 + 0.04 * noise[0],
                "accuracy": accuracy + 0.05 * noise[1],
                "margin": 4 * (accuracy - 0.5) + 0.1 * noise[2],
                "grad_norm": 3 + 0.3 * noise[3],
                "learning_rate": 1e-4 * (1 - step / steps),
                "num_tokens": 1600 * step,
                "num_tokens_computed": 1200 * step,
                "epoch": step / 50,
                "pairs_per_second": 200.0,
                "tokens_per_second": 20000.0,
                "data_wait_s": 0.004,
            }
        )
        if step % every == 0:
            for name in sets:
                head = f"eval_{name}_" if name else "eval_"
                figures = {
                    "loss": 0.66 - 0.2 * (accuracy - 0.5) / 0.3 + 0.01 * noise[4],
                    "accuracy": accuracy - 0.02,
                    "accuracy_low": accuracy - 0.05,
                    "accuracy_high": accuracy + 0.01,
                    "margin": 3 * (accuracy - 0.5),
                }
                made.append({**{head + key: value for key, value in figures.items()}, "step": step})
    ended = {"step": steps, "train_loss": 0.5, "train_runtime": steps * 0.1, "num_tokens": 1600 * steps}
    return [*made, ended | {"num_tokens_computed": 1200 * steps}] if steps else []


SETTINGS = """[model]
name = "models/<b>tiny</b>"

[data]
train = ["pairs/chat.jsonl", {path = "pairs/code.jsonl", weight = 2.0}]
eval = "pairs/held.jsonl"

[reward]
output_dir = "runs/first"
learning_rate = %s
max_length = 1024
"""


def write_run(
    directory: Path, steps: int = 60, *, rate: float = 3e-5, finished: bool = True, **log: Any
) -> Path:
    """A run's directory as `rayrm train` leaves it."""
    directory.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records(steps, **log))
    (directory / "metrics.jsonl").write_text(lines)
    (directory / "progress.json").write_text(
        json.dumps({"step": steps, "num_steps": steps if finished else 2 * steps, "finished": finished})
    )
    (directory / "run.toml").write_text(SETTINGS % rate)
    (directory / "identity.json").write_text(json.dumps({"identity": {"rows_per_step": 16}}))
    refused = [("pairs/chat.jsonl", "too-long")] * 3 + [("pairs/code.jsonl", "missing-chosen")] * 2
    (directory / "quarantine.jsonl").write_text(
        "".join(json.dumps({"source": a, "reason": b, "row": i}) + "\n" for i, (a, b) in enumerate(refused))
    )
    return directory
