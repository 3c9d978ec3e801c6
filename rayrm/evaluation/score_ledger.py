"""What a bulk scoring has done so far: `.OUTPUT.scoring/`, by which the same command goes on after a kill.

`manifest.json` says of what the scores are: the model by its content, the inputs by path, size and time of
change, the options that matter for the output. `scores.jsonl` holds a line for each finished chunk, appended
in one write; a line that a kill cut off ends what is believed. One process at a time holds the directory.
Scores are small beside texts, so the rows are read again for the output and kept nowhere twice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrm.errors import RunDirectoryError
from rayrm.train.holding import LOCK, holding

MANIFEST = "manifest.json"
SCORES = "scores.jsonl"
_ASIDE = "manifest.json.new"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished chunk: `scores` of its rows in order (None: refused, a list for `completions`).

    `refused`: (reason, message) of a refused row, by its place in the chunk.
    """

    piece: int
    number: int
    is_last: bool
    scores: list[Any]
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)

    def line(self) -> bytes:
        """The entry as a line of JSON."""
        told: dict[str, Any] = {"piece": self.piece, "chunk": self.number, "last": self.is_last}
        told["scores"] = self.scores
        if self.refused:
            told["refused"] = self.refused
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Entry:
        """The entry of a line. ValueError, KeyError, TypeError: it is none."""
        told = json.loads(line)
        refused = {int(place): (said[0], said[1]) for place, said in told.get("refused", {}).items()}
        return cls(told["piece"], told["chunk"], told["last"], list(told["scores"]), refused)


class ScoreLedger:
    """The finished chunks of one scoring, in a directory that this process holds."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._places: dict[tuple[int, int], int] = {}
        self._ends: dict[int, int] = {}
        self._done: defaultdict[int, set[int]] = defaultdict(set)
        self._file = (home / SCORES).open("a+b", buffering=0)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._places

    def load(self) -> Iterator[Entry]:
        """The entries of an earlier process; what follows an unreadable line is cut off."""
        end = 0
        with (self.home / SCORES).open("rb") as stream:
            for line in stream:
                try:
                    if not line.endswith(b"\n"):
                        break
                    entry = Entry.of_line(line)
                except (ValueError, KeyError, TypeError):
                    break
                self._remember(entry, end)
                end += len(line)
                yield entry
        os.ftruncate(self._file.fileno(), end)

    def add(self, entry: Entry) -> bool:
        """Keep a finished chunk; False where it was there already."""
        if (entry.piece, entry.number) in self._places:
            return False
        end, line = self._file.seek(0, os.SEEK_END), entry.line()
        written = 0
        while written < len(line):
            written += self._file.write(line[written:]) or 0
        self._remember(entry, end)
        return True

    def entry(self, piece: int, number: int) -> Entry | None:
        """A finished chunk, or None where it is not finished."""
        place = self._places.get((piece, number))
        if place is None:
            return None
        self._file.seek(place)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as stream:
            return Entry.of_line(stream.readline())

    def chunks_done(self, piece: int) -> frozenset[int]:
        """The numbers of a piece's finished chunks."""
        return frozenset(self._done.get(piece, ()))

    def is_done(self, piece: int) -> bool:
        """Whether all chunks of a piece are known to be finished."""
        return self._ends.get(piece) == len(self._done.get(piece, ()))

    def close(self) -> None:
        self._file.close()

    def _remember(self, entry: Entry, place: int) -> None:
        self._places[entry.piece, entry.number] = place
        self._done[entry.piece].add(entry.number)
        if entry.is_last:
            self._ends[entry.piece] = entry.number + 1


@contextmanager
def open_ledger(output: Path, facts: Mapping[str, Any]) -> Iterator[ScoreLedger]:
    """The ledger of `output` within the block; it is left where the block raises, unless it is empty.

    Raises:
        RunDirectoryError: the directory holds the work of another command, or something else, or another
            process writes there.
    """
    home = partial_of(output)

    def taken(holder: str) -> None:
        raise RunDirectoryError(
            f"another `rayrm score` writes `{output}` ({holder}). Wait for it, or type another --output."
        )

    if home.exists() and not home.is_dir():
        raise RunDirectoryError(
            f"`{home}` is a file, and work is kept there. Move it, or type another --output."
        )
    with holding(home / LOCK, taken):
        _begin(home, json.loads(json.dumps(facts)), output)
        ledger = ScoreLedger(home)
        try:
            yield ledger
        finally:
            ledger.close()
            if not len(ledger):
                shutil.rmtree(home, ignore_errors=True)


def partial_of(output: Path) -> Path:
    """Where the work for an output is kept until it is whole; hidden, so that it is never an input."""
    return output.with_name(f".{output.name}.scoring")


def _begin(home: Path, facts: dict[str, Any], output: Path) -> None:
    manifest = home / MANIFEST
    if not manifest.is_file():
        others = sorted(path.name for path in home.iterdir() if path.name not in (LOCK, _ASIDE))
        if others:
            raise RunDirectoryError(
                f"`{home}` holds {others[0]!r}, which is none of `rayrm score`'s. Move it, or type another "
                "--output."
            )
        (home / _ASIDE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (home / _ASIDE).replace(manifest)
        return
    before = json.loads(manifest.read_text(encoding="utf-8"))
    if before != facts:
        raise RunDirectoryError(
            f"`{home}` holds unfinished scores of another command: {_difference(before, facts)}. Type that "
            f"command to go on with it, or `rm -r {home}` to begin {output.name} anew."
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two manifests disagree on, the first thing of it."""
    for name in now:
        then, this = before.get(name), now[name]
        if then == this:
            continue
        if isinstance(then, list) and isinstance(this, list):
            changed = next((entry for entry in this if entry not in then), None)
            missing = next((entry for entry in then if entry not in this), None)
            if changed is not None and missing is not None and changed[0] == missing[0]:
                return f"the file {changed[0]} was changed since"
            if changed is not None:
                return f"{changed[0]} is no input of it"
            if missing is not None:
                return f"{missing[0]} is an input of it"
            return "its inputs come in another order"
        if isinstance(then, dict) and isinstance(this, dict):
            option = next(key for key in {**then, **this} if then.get(key) != this.get(key))
            return f"`{option}` was {then.get(option)!r}, and is {this.get(option)!r} now"
        return f"the {name} was {then!r}, and is {this!r} now"
    return "it was begun by another version of rayrm"
