"""The demo's preference pairs: written by the project, drawn from a seed, split by prompt and by template.

Guarantees, each of them a test: every prompt is there once; all pairs of a held-out template (every sixth one
of each kind) are held out, so its wording is never trained on; within each kind and each split the preferred
answer is as often the longer as the shorter one; the same seed gives the same rows. The *fillings*
(countries, tasks, names) are shared by both splits. Drawing 2,400 pairs takes well under a second.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rayrm.demo import kinds_content, kinds_manner
from rayrm.demo.kinds import Kind
from rayrm.errors import ConfigError

KINDS: tuple[Kind, ...] = (*kinds_content.KINDS, *kinds_manner.KINDS)
HOLD_OUT_EVERY = 6
_PATIENCE = 400  # draws in a row that may bring nothing new before the tables count as used up

Row = dict[str, Any]


def make_preferences(num_pairs: int = 2400, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """`num_pairs` preference rows as (train, held out), five to one; about equally many of each kind.

    A row has `prompt`, `chosen`, `rejected` (lists of messages), `kind` and `template`. `seed` also decides
    which templates are held out. Raises `ConfigError` when the templates cannot give so many distinct
    prompts.
    """
    rng = random.Random(seed)
    held_out = seed % HOLD_OUT_EVERY
    asked: set[str] = set()
    train: list[Row] = []
    heldout: list[Row] = []
    for place, kind in enumerate(KINDS):
        count = num_pairs * (place + 1) // len(KINDS) - num_pairs * place // len(KINDS)
        num_heldout = round(count / HOLD_OUT_EVERY)
        numbers = range(len(kind.templates))
        heldout += _draw(
            kind, [n for n in numbers if n % HOLD_OUT_EVERY == held_out], num_heldout, asked, rng
        )
        train += _draw(
            kind, [n for n in numbers if n % HOLD_OUT_EVERY != held_out], count - num_heldout, asked, rng
        )
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def write_preferences(directory: str | Path, num_pairs: int = 2400, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` into `directory` (made if absent) and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    for path, rows in zip(paths, make_preferences(num_pairs, seed), strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def answer_text(messages: list[dict[str, str]]) -> str:
    """The words of an answer (or a prompt): its messages' contents."""
    return "\n".join(message["content"] for message in messages)


def _draw(kind: Kind, numbers: list[int], count: int, asked: set[str], rng: random.Random) -> list[Row]:
    """`count` new rows from the templates `numbers` in turn, as many with the longer answer preferred as not.

    `asked` holds the prompts already taken and gains the new ones.
    """
    rows: list[Row] = []
    used = dict.fromkeys(numbers, 0)
    lead = missed = 0  # lead: how many more pairs so far prefer the longer answer than the shorter
    while len(rows) < count:
        # The least used template first; where its wording would upset the balance, the next.
        for number in sorted(numbers, key=lambda number: (used[number], rng.random())):
            question, better, worse = kind.templates[number].write(rng)
            step = (len(better) > len(worse)) - (len(better) < len(worse))
            if question not in asked and better != worse and abs(lead + step) <= 1:
                break
        else:
            missed += 1
            if missed > _PATIENCE:
                raise ConfigError(
                    f"num_pairs is more than the templates of {kind.name} ({count} asked, {len(rows)} found) "
                    "can give with distinct prompts. Ask for fewer pairs."
                )
            continue
        missed = 0
        lead += step
        used[number] += 1
        asked.add(question)
        rows.append(_row(kind.name, number, question, better, worse))
    return rows


def _row(kind: str, number: int, question: str, better: str, worse: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
        "kind": kind,
        "template": f"{kind}-{number:02d}",
    }
