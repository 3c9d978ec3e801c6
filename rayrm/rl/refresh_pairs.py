"""A round's preference pairs: samples are taken, judged, and written as rankings, each step of it kept.

In the round's directory, in the order in which they appear:

    taken-K.json     prompts with their completions, and the cursor behind them: written at once or not at
                     all, so that a sample is taken exactly once
    judged-K.jsonl   what the judge said of each prompt, appended as it says it: nothing is judged twice
    pairs.jsonl      the rankings of all batches, whole; where it is, the round takes no more

A round takes another batch where the judge preferred nothing in too many prompts of the ones before.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayrm.errors import writing
from rayrm.rl.judge import Judge, ranks_of
from rayrm.rl.refresh_samples import Group, Place, SampleReader, Taken
from rayrm.train.records import replace_text

logger = logging.getLogger("rayrm.rl")

PAIRS = "pairs.jsonl"
JUDGED, TIED = "judged", "tied"
"""What is counted of prompts: those that were judged, and those of them in which nothing is preferred."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A round's rows, `{prompt, completions, ranks}` in `file`, and what was counted on the way to them."""

    file: Path
    num_rows: int
    counts: dict[str, int]


def gather(
    directory: Path, reader: SampleReader, judge: Judge, *, min_pairs: int, wait: Callable[[str], None]
) -> Gathered:
    """Take and judge until `directory` has `min_pairs` rows; goes on where it was cut off.

    `wait` is called between two looks at the samples, with a line that says how far it is.

    Raises DataError, ScoreError: as the reader and the judge.
    """
    file = directory / PAIRS
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    batch = 0
    while True:
        taken = read_taken(directory, batch)
        if taken is None:
            if file.exists() or len(rows) >= min_pairs:
                break
            taken = _take(directory, batch, reader, min_pairs - len(rows), wait)
        verdicts = _judged(directory, batch, taken.groups, judge)
        counts.update(taken.counts)
        for group, scores in zip(taken.groups, verdicts, strict=True):
            counts[JUDGED] += 1
            if len(set(scores)) == 1:
                counts[TIED] += 1
                continue
            rows.append({"prompt": group.prompt, "completions": group.completions, "ranks": ranks_of(scores)})
        batch += 1
    if not file.exists():
        with writing(file):
            replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return Gathered(file, len(rows), dict(counts))


def read_taken(directory: Path, batch: int) -> Taken | None:
    """A batch that was taken; None: it was not."""
    file = _taken_file(directory, batch)
    if not file.exists():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    cursor = {path: Place.of(kept) for path, kept in fields["cursor"].items()}
    return Taken([Group(**group) for group in fields["groups"]], cursor, fields["counts"])


def last_cursor(directory: Path) -> dict[str, Place]:
    """The cursor behind a round's newest batch; empty where it has none."""
    cursor: dict[str, Place] = {}
    batch = 0
    while (taken := read_taken(directory, batch)) is not None:
        cursor = taken.cursor
        batch += 1
    return cursor


def _taken_file(directory: Path, batch: int) -> Path:
    return directory / f"taken-{batch}.json"


def _take(
    directory: Path, batch: int, reader: SampleReader, missing: int, wait: Callable[[str], None]
) -> Taken:
    reader.look()
    while reader.num_ready < missing:
        wait(
            f"{reader.num_ready} of {missing} prompts with different completions in {reader.num_files} files"
        )
        reader.look()
    taken = reader.take()
    file = _taken_file(directory, batch)
    with writing(file):
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(asdict(taken)))
    return taken


def _judged(directory: Path, batch: int, groups: list[Group], judge: Judge) -> list[list[float]]:
    """The judge's scores of each group's completions; those that it has given already are not asked for."""
    file = directory / f"judged-{batch}.jsonl"
    found = _read_verdicts(file)
    asked = [
        (place, group.prompt, group.completions) for place, group in enumerate(groups) if place not in found
    ]
    if asked:
        logger.info("asking the judge %s about %d prompts", judge.name, len(asked))
        with writing(file), file.open("a", encoding="utf-8") as out:

            def keep(place: int, scores: list[float]) -> None:
                out.write(json.dumps({"place": place, "scores": scores}) + "\n")
                out.flush()  # a process that is killed then loses none
                found[place] = scores

            try:
                judge.ask(asked, keep)
            finally:
                os.fsync(out.fileno())
    return [found[place] for place in range(len(groups))]


def _read_verdicts(file: Path) -> dict[int, list[float]]:
    """The whole lines of the file, by place; half a line, which a kill left, is cut off."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["place"]: line["scores"] for line in lines}
