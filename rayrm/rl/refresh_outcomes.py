"""How the rounds of a refresh ended, as its directory keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rayrm.errors import writing
from rayrm.rl.refresh_gate import Share
from rayrm.train.records import replace_text

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round ended.

    `base` is the version that it trained from, `version` the one that it published (None: it did not);
    `reason` says why it was refused. Rows: its own, those of refused rounds before it, and replayed ones.
    `counts`: of its samples and prompts, by what became of them.
    """

    round: int
    accepted: bool
    reason: str | None
    base: str
    version: str | None
    num_rows: int
    num_carried: int
    num_replayed: int
    num_steps: int
    counts: dict[str, int]
    before: Share
    after: Share | None
    probe_agreement: float | None
    ended_at: float


def read_outcomes(output_dir: Path) -> list[Outcome]:
    """The outcomes of the rounds that ended, in their order."""
    found: list[Outcome] = []
    while (file := round_directory(output_dir, len(found) + 1) / "outcome.json").exists():
        fields = json.loads(file.read_text(encoding="utf-8"))
        shares = {name: Share(**fields[name]) for name in ("before", "after") if fields[name] is not None}
        found.append(Outcome(**{**fields, **shares}))
    return found


def round_directory(home: Path, number: int) -> Path:
    return home / f"round-{number}"


def write_outcome(home: Path, outcome: Outcome) -> None:
    """Keep how a round ended; from then on it is not gone on with."""
    directory = round_directory(home, outcome.round)
    with writing(directory):
        replace_text(directory / "outcome.json", json.dumps(asdict(outcome), indent=2))


def log_outcomes(home: Path, outcomes: Sequence[Outcome]) -> None:
    """A line for each round that ended; written whole, so none is there twice."""
    file = home / ROUNDS
    with writing(file):
        replace_text(file, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))


def best_of(outcomes: Sequence[Outcome]) -> Share | None:
    """The highest held-out accuracy of a version that served in these rounds."""
    shares = [outcome.before for outcome in outcomes]
    shares += [outcome.after for outcome in outcomes if outcome.accepted and outcome.after is not None]
    return max(shares, key=lambda share: share.accuracy, default=None)
