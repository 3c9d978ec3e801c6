"""Run and evaluation directories as training and `rayrm evaluate` leave them, with planted numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
) -> dict[str, Any]:
    """Columns of an outcomes file: margins around `skill`, and `by_length` of score for 100 tokens."""
    rng = np.random.default_rng(seed)
    # Rows, prompts and lengths are the same whatever the model is: other draws come after.
    lengths = rng.integers(20, 600, (2, num))
    group = np.array(groups)[np.arange(num) % len(groups)]
    noise = rng.standard_normal((2, num))
    scores = noise + by_length * lengths / 100
    return {
        "won": scores[0] + skill,
        "lost": scores[1],
        "won_length": lengths[0],
        "lost_length": lengths[1],
        "weight": np.ones(num),
        "row": np.arange(num),
        "prompt": np.arange(num, dtype=np.uint64),
        "group": group.astype(str),
    }


def wilson(right: float, n: int) -> tuple[float, float]:
    p, z = right / n, 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def told_of(columns: dict[str, Any], findings: Sequence[str] = ()) -> dict[str, Any]:
    """One set of `evaluation.json`, its figures computed from the columns."""
    margin = columns["won"] - columns["lost"]
    longer = np.sign(columns["won_length"] - columns["lost_length"]) / 2 + 0.5

    def figures(kept: Any) -> dict[str, float]:
        right, n = float((margin[kept] > 0).sum()), int(kept.sum())
        low, high = wilson(right, n)
        return {
            "accuracy": right / n,
            "accuracy_low": low,
            "accuracy_high": high,
            "num_pairs": n,
            "length_baseline_accuracy": float(longer[kept].mean()),
            "margin": float(margin[kept].mean()),
        }

    every = np.ones(len(margin), np.bool_)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = []
    for low in np.arange(0.5, 1.0, 0.05):
        here = (confidence > low) & (confidence <= low + 0.05)
        if here.any():
            told = {"confidence": confidence[here].mean(), "accuracy": (margin[here] > 0).mean()}
            bins.append(
                {"low": low, "high": low + 0.05, "count": int(here.sum())}
                | {k: float(v) for k, v in told.items()}
            )
    ece = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(margin)
    length = np.concatenate([columns["won_length"], columns["lost_length"]])
    score = np.concatenate([columns["won"], columns["lost"]])
    constant = float(np.ptp(score)) == 0
    metrics = {
        **figures(every),
        "loss": float(np.log1p(np.exp(-margin)).mean()),
        "accuracy_bootstrap_low": figures(every)["accuracy_low"] - 0.001,
        "accuracy_bootstrap_high": figures(every)["accuracy_high"] + 0.001,
        "random_baseline_accuracy": 0.5,
        "ties": float((margin == 0).mean()),
        "ece": ece,
        "temperature": 1.31,
        "ece_at_temperature": ece / 3,
        "length_correlation": None if constant else float(np.corrcoef(length, score)[0, 1]),
        "num_rows": len(margin),
    }
    groups = {str(name): figures(columns["group"] == name) for name in np.unique(columns["group"])}
    worst = [
        {
            "where": f"pairs.jsonl:{place + 1}",
            "group": str(columns["group"][place]),
            "margin": float(margin[place]),
            "chosen_score": float(columns["won"][place]),
            "rejected_score": float(columns["lost"][place]),
            "prompt": f"{EVIL} question {place}",
            "chosen": "word " * 30 + "x" * 3000,
            "rejected": f"second {EVIL}",
        }
        for place in np.argsort(margin)[:20].tolist()
        if margin[place] <= 0
    ]
    return {
        "metrics": metrics,
        "groups": groups,
        "reliability": bins,
        "findings": list(findings),
        "worst": worst,
    }


def write_evaluation(directory: Path, sets: dict[str, dict[str, Any]], findings: Sequence[str] = ()) -> Path:
    """An evaluation's directory of sets given by their columns."""
    directory.mkdir(parents=True, exist_ok=True)
    told = {}
    for place, (name, columns) in enumerate(sets.items()):
        pq.write_table(pa.table(columns), directory / f"outcomes-{place}.parquet")
        told[name] = {
            **told_of(columns, findings if place == 0 else ()),
            "outcomes": f"outcomes-{place}.parquet",
        }
    (directory / "evaluation.json").write_text(
        json.dumps(
            {
                "format": 1,
                "model": "runs/first/final",
                "version": "3f2a91bc04de",
                "created": "2026-01-02T03:04:05+00:00",
                "sets": told,
            }
        )
    )
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
