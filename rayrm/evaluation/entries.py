"""Rows of benchmarks, whatever their columns -> entries: completions of one prompt, and how good each is.

An entry keeps its texts as the source gives them, strings or messages; `inputs_of` and `as_rows` turn them
into the form that a model takes: a string becomes the user's or the assistant's one message, and such a
message a string again. A row that is not of the benchmark's shape is a `DataError` naming benchmark, row and
column.
Pure: no tokenizer, no torch, no ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn

from rayrm.data.messages import Message, Text, is_list, parse_text, shown
from rayrm.data.tokenize import TextForm, TextInput
from rayrm.errors import DataError, RowError


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a benchmark: K completions of one prompt.

    The first `num_chosen` completions are the better ones and all others the worse. Where that is 0, `gold`
    says how good each is, higher is better. `subsets`: the parts of the benchmark in which it counts.
    `pairs`: the places (better, worse) of those completions that are compared, where only some are.
    """

    where: str
    prompt: Text
    completions: tuple[Text, ...]
    num_chosen: int
    subsets: tuple[str, ...] = ()
    id: str = ""
    gold: tuple[float, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """A source's row, read column by column; each reader raises `DataError` for a column that is not so."""

    benchmark: str
    where: str
    content: Mapping[str, Any]

    def has(self, column: str) -> bool:
        """Whether it says something there: None, with which Arrow fills absent columns, is nothing."""
        return self.content.get(column) is not None

    def value(self, column: str) -> Any:
        """Whatever stands there."""
        if not self.has(column):
            raise DataError(
                f"{self.where}: `{column}` is missing, a column of {self.benchmark} (the row has "
                f"{sorted(map(str, self.content))}); add it, or rename the one that holds it"
            )
        return self.content[column]

    def word(self, column: str) -> str:
        """A name or a label; a number is its digits."""
        value = self.value(column)
        if isinstance(value, bool) or not isinstance(value, str | Integral):
            self.refuse(column, "must be a string")
        return str(value)

    def count(self, column: str) -> int:
        """A whole number from 0."""
        value = self.value(column)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            self.refuse(column, "must be a whole number, 0 or more")
        return int(value)

    def numbers(self, column: str, count: int) -> tuple[float, ...]:
        """`count` finite numbers; True is 1."""
        value = self.value(column)
        if not is_list(value) or len(value) != count:
            self.refuse(column, f"must be a list of {count} numbers, one a completion")
        if not all(isinstance(number, Real) and math.isfinite(number) for number in value):
            self.refuse(column, "must hold finite numbers")
        return tuple(float(number) for number in value)

    def text(self, column: str) -> Text:
        """A string or messages."""
        return self._parsed(column, self.value(column))

    def texts(self, column: str) -> tuple[Text, ...]:
        """A list of at least one string, or of message lists."""
        value = self.value(column)
        if not is_list(value) or not len(value) or isinstance(value[0], Mapping):
            self.refuse(column, "must be a list of completions, at least one")
        return tuple(self._parsed(f"{column}[{place}]", text) for place, text in enumerate(value))

    def refuse(self, column: str, rule: str) -> NoReturn:
        """Raise `DataError`: what stands in the column, and what must."""
        raise DataError(
            f"{self.where}: `{column}` ({shown(self.content.get(column))}) {rule} in a row of "
            f"{self.benchmark}; correct it, or leave the row out"
        )

    def _parsed(self, name: str, value: Any) -> Text:
        try:
            return parse_text(name, value)
        except RowError as error:
            raise DataError(f"{self.where}: of {self.benchmark}: {error}") from None


def split_dialogues(row: BenchmarkRow, prompt: Text, completions: Sequence[Text]) -> tuple[Text, list[Text]]:
    """The prompt, and the completions without it: some sources repeat it at the beginning of each.

    A completion that begins with another message than the assistant's is a whole dialogue, whose last message
    is judged; what comes before it is the prompt, and must be the same for all of a row.
    """
    if not any(not isinstance(text, str) and text and text[0]["role"] != "assistant" for text in completions):
        return prompt, list(completions)
    if any(isinstance(text, str) or len(text) < 2 for text in completions):
        raise DataError(
            f"{row.where}: of {row.benchmark}: some completions are whole dialogues and others are not; "
            "write all as what the assistant says, with the dialogue before it as `prompt`"
        )
    before = [text[:-1] for text in completions]
    if any(other != before[0] for other in before):
        raise DataError(
            f"{row.where}: of {row.benchmark}: the dialogues differ before their last message, and all "
            "of a row have one prompt; correct them, or leave the row out"
        )
    return list(_messages(before[0])), [list(_messages(text[-1:])) for text in completions]


def inputs_of(entry: Entry, text_form: TextForm) -> list[TextInput]:
    """What is to be scored, one input for each completion, in order. DataError as `as_rows`."""
    prompt = in_form(entry, entry.prompt, "user", text_form)
    return [TextInput(prompt, in_form(entry, text, "assistant", text_form)) for text in entry.completions]


def as_rows(entries: Sequence[Entry], text_form: TextForm) -> list[dict[str, Any]]:
    """The entries as preference rows that a model of this text form takes, in order.

    A better and a worse completion are a pair {prompt, chosen, rejected}, all else is a ranking {prompt,
    completions, ranks}. Strings of a standard model are joined as they stand. Raises DataError for a dialogue
    of several turns, or one with a system message, where the model takes plain strings.
    """
    rows: list[dict[str, Any]] = []
    for entry in entries:
        inputs = inputs_of(entry, text_form)
        completions = [each.completion for each in inputs]
        if entry.num_chosen == 1 and len(completions) == 2:
            chosen, rejected = completions
            rows.append({"prompt": inputs[0].prompt, "chosen": chosen, "rejected": rejected})
        else:
            rows.append({"prompt": inputs[0].prompt, "completions": completions, "ranks": ranks_of(entry)})
    return rows


def in_form(entry: Entry, text: Text, role: str, text_form: TextForm) -> Text:
    """One text of an entry as a model takes it; `role`: who says it, where it is a string."""
    if text_form == "conversational":
        return [{"role": role, "content": text}] if isinstance(text, str) else text
    if isinstance(text, str) or not text:
        return text or ""
    if len(text) != 1 or text[0]["role"] != role or not text[0].get("content"):
        roles = ", ".join(str(message["role"]) for message in text)
        raise DataError(
            f"{entry.where}: this model takes plain strings, and a dialogue (roles: {roles}) is none; use a "
            "conversational model, or leave the row out"
        )
    content = text[0]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _messages(text: Text) -> list[Message]:
    assert not isinstance(text, str)
    return text


def ranks_of(entry: Entry) -> list[int]:
    """The rank of each completion, lower is better."""
    if entry.num_chosen:
        return [int(place >= entry.num_chosen) for place in range(len(entry.completions))]
    best_first = sorted(set(entry.gold), reverse=True)
    return [best_first.index(gold) for gold in entry.gold]
