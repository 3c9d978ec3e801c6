"""Which rows of a source a set takes: those of its side of a split by prompt, without excluded prompts.

A row is told by a hash of its prompt's text as people would compare it: without case, runs of space and
punctuation. Invariants, each a test: all rows of one prompt are on one side; the side is the same in every
run, on any machine, in whatever order and file the rows stand; each row is on exactly one side.
Pure: no ray, no tokenizer. Cost: about 40 us a prompt of 500 characters, 8 bytes an excluded prompt.

An implicit prompt is what the completions share, up to the last turn of the dialogue. Where strings show no
turns (and in ids) it ends where the completions part: two pairs of one prompt may then count as two prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rayrm.data.labels import ANY_LABELS
from rayrm.data.messages import Message, Text, parse_text, shown
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data_settings import DataConfig
from rayrm.errors import DataError, RowError

HELD_OUT = "held-out"
EXCLUDED = "excluded-prompt"
Hashes = npt.NDArray[np.uint64]

_log = logging.getLogger("rayrm.data")
_TURN = re.compile(
    r"(?:^|\n)[ \t]*[#*<\[]*[ \t]*"
    r"(?:human|user|assistant|system|question|answer|q|a|ai|bot|instruction|input|response|output)"
    r"[ \t]*[*>\]]*[ \t]*:[*]*"
    r"|<\|[^|<>\n]{1,40}\|>|<start_of_turn>\w*|\[/?INST\]",
    re.IGNORECASE,
)
_CALCULATION = re.compile(r"(?<=\d)\s*([-*/%^])\s*(?=\d)")
# Where these stand between digits they are no punctuation: 3 * 4 and 3 / 4 are two prompts.
_OPERATORS = str.maketrans("-*/%^", "\u2212\u00d7\u00f7\u2052\u2191")


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The rows of one side of a split by prompt, without those of excluded prompts; pickles small.

    `eval_fraction` of all possible hashes belong to the part "eval", the others to "train"; "all" is both.
    `excluded`: sorted hashes of prompts, uint64.
    """

    part: Literal["all", "train", "eval"] = "all"
    eval_fraction: float = 0.0
    excluded: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def rules(self) -> str:
        """What tells this selection from others, short."""
        excluded = hashlib.blake2b(self.excluded.tobytes(), digest_size=16).hexdigest()
        return f"{self.part} {self.eval_fraction!r} {excluded}"

    def reason(self, row: PreferenceRow) -> Literal["held-out", "excluded-prompt"] | None:
        """Why the row is not in the set, or None: it is of the other part, or its prompt is excluded."""
        splits = self.part != "all" and self.eval_fraction > 0
        if not splits and not len(self.excluded):
            return None
        found = prompt_hash(prompt_of(row))
        if splits and (found / 2**64 < self.eval_fraction) != (self.part == "eval"):
            return "held-out"
        place = int(np.searchsorted(self.excluded, np.uint64(found)))
        if place < len(self.excluded) and int(self.excluded[place]) == found:
            return "excluded-prompt"
        return None

    def refusal(self, row: PreferenceRow) -> RowError | None:
        """The same with a message, for a row that is not in the set."""
        reason = self.reason(row)
        if reason is None:
            return None
        if reason == HELD_OUT:
            return RowError(reason, "its prompt belongs to the other part of `eval_fraction`'s split")
        return RowError(
            reason,
            f"its prompt ({shown(prompt_of(row))}) is one of `exclude_prompts_of`, up to case, space and "
            "punctuation; the row is left out",
        )


EVERY_ROW = Selection()


def selections(data: DataConfig) -> tuple[Selection, Selection]:
    """What a run's training set takes of its source, and an evaluation set made by `eval_fraction`."""
    training, evaluation = (Selection(part, data.eval_fraction) for part in ("train", "eval"))
    if data.exclude_prompts_of is not None:
        excluded = excluded_prompts(data.exclude_prompts_of, data.columns)
        _log.info("no training row has one of %d prompts of %s", len(excluded), data.exclude_prompts_of)
        training = replace(training, excluded=excluded)
    return training, evaluation


def prompt_of(row: PreferenceRow) -> str:
    """The prompt's text: as given, or what the completions share up to where the last turn begins.

    Messages are written with their roles, but a user's one message as its text alone: so the same question
    is the same prompt in a file of strings and in one of messages.
    """
    if row.prompt:
        return _written(row.prompt)
    texts = [text for text in row.completions if isinstance(text, str)]
    dialogues = [text for text in row.completions if not isinstance(text, str)]
    if row.ids is not None:
        shared, whole = _ids(_shared(row.ids)), [_ids(ids) for ids in row.ids]
    elif texts:
        shared = _turns_before(os.path.commonprefix(texts))  # noqa: RUF071 - of characters, no paths
        whole = texts
    else:
        # What is judged is the last message at least, also where one dialogue goes on from another's end.
        shared = _written(_shared([messages[:-1] for messages in dialogues]))
        whole = [_written(messages) for messages in dialogues]
    # Completions that share nothing have no prompt; such a row is told by its completions.
    return shared or "\n".join(sorted(whole))


def prompt_text(prompt: Any) -> str:
    """A prompt's text as `prompt_of` has it, of a string or messages. Raises RowError for what is neither."""
    return _written(parse_text("prompt", prompt))


def normalised(prompt: str) -> str:
    """The prompt without what two spellings of it differ in: case, punctuation, runs of space, width."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    signs = _CALCULATION.sub(lambda match: match[1].translate(_OPERATORS), folded)
    # A prompt of nothing but punctuation is told by that.
    return " ".join(signs.translate(_SPACED).split()) or " ".join(folded.split())


def prompt_hash(prompt: str) -> int:
    """64 bits of the normalised prompt."""
    content = normalised(prompt).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def excluded_prompts(
    source: Any, columns: Mapping[str, str] | None = None, *, name: str = "exclude_prompts_of"
) -> Hashes:
    """The sorted hashes of a source's prompts; a row needs no more than its `prompt`.

    `source` as `plan_sources` takes it; `columns`: our names of its columns -> its own; `name`: the setting
    that names it, for messages. A row without a
    readable prompt excludes nothing and is logged; `DataError` for a source in which no row has one.
    """
    plan = plan_sources(source, max_rows=None, name=name)
    rows = ((row.where, row.content) for piece in plan.work for row in read_work(piece))
    unread: list[str] = []
    found = sorted({prompt_hash(prompt) for prompt in _prompts(rows, columns or {}, unread)})
    named = ", ".join(plan.names[:3])
    if not found:
        raise DataError(
            f"`{name}` ({named}) has no row with a prompt"
            + (f" ({unread[0]})" if unread else "")
            + "; give a source with a `prompt` column, or with pairs"
        )
    if unread:
        _log.warning(
            "%s: %d rows of %s have no readable prompt and exclude nothing; first: %s",
            *(name, len(unread), named, unread[0]),
        )
    return np.array(found, np.uint64)


def renamed(content: Any, columns: Mapping[str, str]) -> Any:
    """A row with our column names: `columns` has our names -> the source's; other columns stay."""
    if not columns or not isinstance(content, Mapping):
        return content
    theirs = set(columns.values())
    kept = {key: value for key, value in content.items() if key not in theirs}
    return kept | {ours: content[name] for ours, name in columns.items() if name in content}


def _prompts(rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], unread: list[str]) -> Iterator[str]:
    for where, content in rows:
        try:
            yield _prompt_in(renamed(content, columns))
        except RowError as error:
            unread.append(f"{where}: {error}")


def _prompt_in(content: Any) -> str:
    if isinstance(content, RowError):
        raise content
    if isinstance(content, Mapping) and content.get("prompt"):
        return prompt_text(content["prompt"])
    return prompt_of(parse_row(content, ANY_LABELS))


def _written(text: Text) -> str:
    if isinstance(text, str):
        return text
    if [message["role"] for message in text] == ["user"]:
        return _content(text[0])
    return "\n".join(f"{message['role']}: {_content(message)}" for message in text)


def _content(message: Message) -> str:
    content = message.get("content") or ""
    said = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    return f"{said} {json.dumps(calls, sort_keys=True, default=repr)}" if calls else said


def _turns_before(shared: str) -> str:
    """Shared text up to the end of the last turn's opening; without turns, to its last whole word."""
    turns = list(_TURN.finditer(shared))
    if turns:
        return shared[: turns[-1].end()]
    return shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1] or shared


def _shared(lists: Sequence[list[Any]]) -> list[Any]:
    """What all the lists begin with."""
    end = next(
        (
            place
            for place, entries in enumerate(zip(*lists, strict=False))
            if entries.count(entries[0]) < len(lists)
        ),
        min(map(len, lists)),
    )
    return lists[0][:end]


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))


class _Spaces(dict[int, int | None]):
    """For `str.translate`: punctuation, space and control signs as a space, invisible signs as nothing."""

    def __missing__(self, point: int) -> int | None:
        category = unicodedata.category(chr(point))
        if category == "Cf":
            self[point] = None
        else:
            self[point] = 32 if category[0] in "PZC" or category == "Sk" else point
        return self[point]


_SPACED = _Spaces()
