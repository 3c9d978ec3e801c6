"""Rows of the original preferences for a round of training, so that the model does not forget them.

A seeded draw over the whole source, read once in this process: which rows are drawn is the same in every
attempt at a round, and another in the next round.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

from rayrm.data.preference import parse_row
from rayrm.data.selection import Selection
from rayrm.data.sources import plan_sources, read_work
from rayrm.errors import RowError, writing
from rayrm.train.records import replace_text

logger = logging.getLogger("rayrm.rl")

_KEYS = (
    "prompt", "chosen", "rejected", "completions", "ranks", "margin", "target", "tools",
    "chat_template_kwargs", "chosen_ids", "rejected_ids", "completions_ids",
)  # fmt: skip


def num_replayed(num_rows: int, share: float) -> int:
    """How many rows beside `num_rows` others are `share` of all: r / (r + n) = share."""
    return round(num_rows * share / (1 - share))


def draw_replay(source: Any, wanted: int, *, held_out: Selection, seed: int) -> list[dict[str, Any]]:
    """`wanted` rows of `source`, or all where it has fewer; each row with the same chance.

    Those with a held-out prompt, and those that are no preference, are not among them. Raises DataError for a
    source that cannot be read.
    """
    drawn: list[dict[str, Any]] = []
    rng, seen = random.Random(seed), 0
    plan = plan_sources(source, max_rows=None, name="replay", contiguous=True)
    for row in (row for work in plan.work for row in read_work(work)):
        try:
            if isinstance(row.content, RowError) or held_out.reason(parse_row(row.content)):
                continue
        except RowError:
            continue
        # Vitter's algorithm R ("Random sampling with a reservoir", ACM TOMS 11, 1985).
        seen += 1
        place = len(drawn) if len(drawn) < wanted else rng.randrange(seen)
        if place < wanted:
            drawn[place : place + 1] = [
                {key: row.content[key] for key in _KEYS if row.content.get(key) is not None}
            ]
    if len(drawn) < wanted:
        logger.warning("`replay` has %d rows, and the round has room for %d", len(drawn), wanted)
    return drawn


def write_replay(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as jsonl, whole or not at all."""
    with writing(file):
        replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
