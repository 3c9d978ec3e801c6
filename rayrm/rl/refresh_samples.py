"""The samples that RL appends to its files -> prompts with their different completions, each sample once.

What was read is told by a cursor: of each file the offset, in bytes, up to which its lines were taken.
A line that is still being written is left for the next look. So are the samples of a file's newest step
until another step follows or the file rests for a look: a prompt's completions are judged together. Whoever
keeps the cursor with what was taken loses nothing and takes nothing twice. Pure, but for reading files.
"""

from __future__ import annotations

import glob
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

SAMPLES, REPEATED, ALONE = "samples", "repeated", "alone"
"""What is counted beside the reasons for which samples are left out: lines read, completions that their
prompt had already, and prompts with one completion, which nothing is compared with."""


@dataclass(slots=True)
class Group:
    """A prompt and its different completions, in the order in which they were sampled."""

    prompt: Text
    completions: list[Text] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Taken:
    """Prompts with two or more completions, the cursor behind them, and what was counted on the way."""

    groups: list[Group]
    cursor: dict[str, int]
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
        cursor: Mapping[str, int],
        *,
        text_form: TextForm,
        held_out: Selection = EVERY_ROW,
    ) -> None:
        self._patterns = patterns
        self._cursor = dict(cursor)
        self._text_form = text_form
        self._held_out = held_out
        self._sizes: dict[str, int] = {}
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
        for file in sorted(
            {str(Path(path).absolute()) for pattern in self._patterns for path in glob.glob(pattern)}
        ):
            self._read(file)

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

    def _read(self, file: str) -> None:
        begin, size = self._cursor.get(file, 0), Path(file).stat().st_size
        if size < begin:
            raise DataError(
                f"{file} has {size} bytes, and {begin} of it were read before: it was cut or written anew. "
                "Let each RL run write to a directory of its own, and keep what was read."
            )
        rests = self._sizes.get(file) == size
        self._sizes[file] = size
        if size == begin:
            return
        with open(file, "rb") as lines:
            lines.seek(begin)
            content = lines.read(size - begin)
        rows: list[tuple[int, Any]] = []
        end = begin
        broken = False
        for line in content.split(b"\n")[:-1]:
            row = _parsed(file, end, line)
            if row is _BROKEN and broken:
                raise DataError(
                    f"{file}, byte {end}: two lines that follow one another are not JSON in UTF-8. One is "
                    "left by a writer that was killed, two are not. Give files of a JSON object a line."
                )
            broken = row is _BROKEN
            rows.append((end, row))
            end += len(line) + 1
        settled = len(rows) if rests else _settled([row for _, row in rows])
        for at, row in rows[:settled]:
            if row is _BROKEN:
                logger.warning("%s, byte %d: the line is not JSON, and is left out", file, at)
                self._counts["not-json"] += 1
            elif row is not None:
                self._add(file, at, row)
        self._cursor[file] = end if settled == len(rows) else rows[settled][0]

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


def _settled(rows: Sequence[dict[str, Any] | None]) -> int:
    """How many rows stand before those of the newest step; lines without one go with what precedes them."""
    steps = [row.get("step") for row in rows if row]
    settled = len(rows)
    while settled and (not (row := rows[settled - 1]) or row.get("step") == steps[-1]):
        settled -= 1
    return settled
