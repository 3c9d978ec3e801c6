"""The samples that RL appends to its files -> prompts with their different completions, each sample once.

What was read is told by a cursor: of each file the offset, in bytes, up to which its lines were taken, the
newest step among them, and how the file begins. A line that is still being written is left for the next
look. So are the samples of a file's newest step until another step follows or the file rests for a look, and
those of steps that another rank's file, in the same directory, has not reached: a prompt's completions are
judged together. An RL run that goes on from a checkpoint appends steps again: what was taken of them is left
out. Whoever keeps the cursor with what was taken loses nothing and takes nothing twice. Pure, but for reading
files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrm.data.messages import Text, check_completion, check_one_form, parse_text, shown
from rayrm.data.preference import PreferenceRow
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.tokenize import TextForm
from rayrm.errors import DataError, RowError

logger = logging.getLogger("rayrm.rl")

SAMPLES, REPEATED, ALONE, REDONE = "samples", "repeated", "alone", "redone"
"""What is counted beside the reasons for which samples are left out: lines read, completions that their
prompt had already, prompts with one completion, which nothing is compared with, and samples of steps that
were taken before."""
_PATIENCE_LOOKS = 12
"""A rank's file that is behind the others is waited for so many looks without a change: its rank is gone."""
_HEAD_BYTES = 512
_MANY_PROMPTS = 200


@dataclass(frozen=True, slots=True)
class Place:
    """How far a file was taken: `offset` in bytes, the newest `step` and hashes of its samples, and a hash of
    the file's first `num_head` bytes."""

    offset: int = 0
    step: float | None = None
    samples: list[str] = field(default_factory=list)
    num_head: int = 0
    head: str = ""

    def has(self, row: _Row) -> bool:
        """Whether a row's sample was taken: one of an earlier step, or the same of the newest."""
        if self.step is None or row.step is None or row.step > self.step:
            return False
        return row.step < self.step or row.hash in self.samples

    @classmethod
    def of(cls, kept: Place | Mapping[str, Any] | int) -> Place:
        """A place as it was kept; earlier refreshes kept the offset alone."""
        if isinstance(kept, Place):
            return kept
        return cls(kept) if isinstance(kept, int) else cls(**kept)


@dataclass(slots=True)
class Group:
    """A prompt and its different completions, in the order in which they were sampled."""

    prompt: Text
    completions: list[Text] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Taken:
    """Prompts with two or more completions, the cursor behind them, and what was counted on the way."""

    groups: list[Group]
    cursor: dict[str, Place]
    counts: dict[str, int]


class SampleReader:
    """Reads on from a cursor whenever it is told to look.

    Args:
        patterns: globs of the files; one that appears later is read from its beginning.
        cursor: where earlier readers stopped, by absolute path.
        text_form: that of the model; samples of the other are an error.
        held_out: prompts to leave out.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        cursor: Mapping[str, Place | Mapping[str, Any] | int],
        *,
        text_form: TextForm,
        held_out: Selection = EVERY_ROW,
    ) -> None:
        self._patterns = patterns
        self._cursor = {file: Place.of(kept) for file, kept in cursor.items()}
        self._text_form = text_form
        self._held_out = held_out
        self._sizes: dict[str, int] = {}
        self._looks_at_rest: dict[str, int] = {}
        self._said_alone = False
        self._start_over()

    @property
    def num_ready(self) -> int:
        """Prompts with two or more different completions."""
        return sum(len(keys) > 1 for keys in self._keys.values())

    @property
    def num_files(self) -> int:
        """Files that were seen."""
        return len(self._sizes)

    def look(self) -> None:
        """Read what was appended since the last look.

        Raises DataError: a file that shrank, is no jsonl, or whose rows have no `prompt` and `completion`.
        """
        files = sorted({str(Path(path).absolute()) for name in self._patterns for path in glob.glob(name)})
        unread = {file: self._unread(file) for file in files}
        reached = self._reached(unread)
        for file, rows in unread.items():
            self._take_settled(file, rows, reached.get(str(Path(file).parent)))
        if (
            not self._said_alone
            and len(self._keys) >= _MANY_PROMPTS
            and self.num_ready < len(self._keys) / 20
        ):
            self._said_alone = True
            logger.warning(
                "%d of %d prompts have one completion each, which nothing is compared with: a judge needs "
                "several of a prompt (GRPO's and RLOO's groups; PPO writes one)",
                len(self._keys) - self.num_ready,
                len(self._keys),
            )

    def take(self) -> Taken:
        """All that was read and not yet taken."""
        groups = [self._groups[prompt] for prompt, keys in self._keys.items() if len(keys) > 1]
        if alone := len(self._groups) - len(groups):
            self._counts[ALONE] += alone
        taken = Taken(groups, dict(self._cursor), dict(self._counts))
        self._start_over()
        return taken

    def _start_over(self) -> None:
        self._groups: dict[str, Group] = {}
        self._keys: dict[str, set[str]] = {}
        self._counts: Counter[str] = Counter()

    def _unread(self, file: str) -> list[_Row]:
        """The whole lines behind the cursor."""
        size = Path(file).stat().st_size
        place = self._cursor.get(file, Place())
        if place.num_head and _head(file, place.num_head) != place.head:
            logger.warning(
                "%s begins otherwise than before: it is another file, and read from its start", file
            )
            place = self._cursor[file] = Place()
        if size < place.offset:
            raise DataError(
                f"{file} has {size} bytes, and {place.offset} of it were read before: it was cut or written "
                "anew. Let each RL run write to a directory of its own, and keep what was read."
            )
        rests = self._sizes.get(file) == size
        self._looks_at_rest[file] = self._looks_at_rest.get(file, 0) + 1 if rests else 0
        self._sizes[file] = size
        if size == place.offset:
            return []
        with open(file, "rb") as lines:
            lines.seek(place.offset)
            content = lines.read(size - place.offset)
        rows: list[_Row] = []
        end = place.offset
        broken = False
        for line in content.split(b"\n")[:-1]:
            row = _parsed(file, end, line)
            if row is _BROKEN and broken:
                raise DataError(
                    f"{file}, byte {end}: two lines that follow one another are not JSON in UTF-8. One is "
                    "left by a writer that was killed, two are not. Give files of a JSON object a line."
                )
            broken = row is _BROKEN
            begin, end = end, end + len(line) + 1
            rows.append(_Row(begin, end, row))
        return rows

    def _reached(self, unread: Mapping[str, list[_Row]]) -> dict[str, float]:
        """By directory, the newest step that all ranks that still write there have reached."""
        reached: dict[str, float] = {}
        for file, rows in unread.items():
            steps = [row.step for row in rows if row.step is not None]
            newest = steps[-1] if steps else self._cursor.get(file, Place()).step
            if newest is not None and self._looks_at_rest[file] < _PATIENCE_LOOKS:
                home = str(Path(file).parent)
                reached[home] = min(newest, reached.get(home, newest))
        return reached

    def _take_settled(self, file: str, rows: list[_Row], reached: float | None) -> None:
        settled = len(rows) if self._looks_at_rest[file] else _settled(rows)
        place = self._cursor.get(file, Place())
        offset, newest, samples = place.offset, place.step, list(place.samples)
        for row in rows[:settled]:
            if reached is not None and row.step is not None and row.step > reached:
                break
            offset = row.end
            if row.content is _BROKEN:
                logger.warning("%s, byte %d: the line is not JSON, and is left out", file, row.begin)
                self._counts["not-json"] += 1
            elif row.content is not None and not place.has(row):
                self._add(file, row.begin, row.content)
            elif row.content is not None:
                self._counts[REDONE] += 1
            if row.step is not None and (newest is None or row.step >= newest):
                samples = [*(samples if row.step == newest else []), row.hash]
                newest = row.step
        num_head = place.num_head or min(offset, _HEAD_BYTES)
        head = place.head or _head(file, num_head)
        self._cursor[file] = Place(offset, newest, samples, num_head, head)

    def _add(self, file: str, at: int, row: Mapping[str, Any]) -> None:
        self._counts[SAMPLES] += 1
        try:
            prompt = parse_text("prompt", row["prompt"])
            completion = parse_text("completion", row["completion"])
            check_one_form({"prompt": prompt, "completion": completion})
            check_completion("completion", completion, explicit_prompt=bool(prompt))
        except RowError as error:
            self._counts[error.reason] += 1
            return
        form = "standard" if isinstance(completion, str) else "conversational"
        if form != self._text_form:
            raise DataError(
                f"{file}, byte {at}: the sample is {form} and the served model was trained on "
                f"{self._text_form} text. "
                + ("Write plain strings." if self._text_form == "standard" else "Write message lists.")
            )
        key = json.dumps(prompt, sort_keys=True)
        if key not in self._groups:
            if reason := self._held_out.reason(PreferenceRow((completion,), (0,), prompt)):
                self._counts[reason] += 1
                return
            self._groups[key] = Group(prompt)
            self._keys[key] = set()
        written = json.dumps(completion, sort_keys=True)
        if written in self._keys[key]:
            self._counts[REPEATED] += 1
            return
        self._keys[key].add(written)
        self._groups[key].completions.append(completion)


_BROKEN: dict[str, Any] = {}
"""What stands for a line that is no JSON."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A line: where it begins and ends, and its object (None: blank)."""

    begin: int
    end: int
    content: dict[str, Any] | None

    @property
    def step(self) -> float | None:
        step = self.content.get("step") if self.content else None
        return float(step) if isinstance(step, int | float) else None

    @property
    def hash(self) -> str:
        """Of the prompt and the completion."""
        content = self.content or {}
        text = json.dumps([content.get("prompt"), content.get("completion")], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _parsed(file: str, at: int, line: bytes) -> dict[str, Any] | None:
    """The line's object; None for a blank line, `_BROKEN` for what a writer that was killed left of one."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return _BROKEN
    if not isinstance(row, dict) or row.get("prompt") is None or row.get("completion") is None:
        raise DataError(
            f"{file}, byte {at}: the line ({shown(row)}) must be an object with `prompt` and `completion`. "
            "Give the samples-*.jsonl that the RL run writes."
        )
    return row


def _settled(rows: Sequence[_Row]) -> int:
    """How many rows stand before those of the newest step; lines without one go with what precedes them."""
    steps = [row.content.get("step") for row in rows if row.content]
    settled = len(rows)
    while settled and (not (content := rows[settled - 1].content) or content.get("step") == steps[-1]):
        settled -= 1
    return settled


def _head(file: str, num_bytes: int) -> str:
    """A hash of how a file begins; "" of nothing."""
    if num_bytes == 0:
        return ""
    with open(file, "rb") as begin:
        return hashlib.blake2b(begin.read(num_bytes), digest_size=8).hexdigest()
