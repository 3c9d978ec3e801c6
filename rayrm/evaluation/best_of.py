"""Scored rows -> the best completion of each prompt, or a preference pair of its best and its worst.

A group is one row with `completions`, or consecutive rows with `completion` and the same prompt, tools and
template settings; a prompt that comes again later is a group again. Of equal scores the first counts. What is
left out is counted under the reason for it. Rows stream: of a group only best and worst are held.

Best of N is what rejection sampling trains on (https://arxiv.org/abs/2307.09288, section 3.2.3); best against
worst of N are the pairs of https://arxiv.org/abs/2401.12086.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rayrm.data.preference import parse_row
from rayrm.errors import DataError, RowError
from rayrm.evaluation.score_chunks import same_prompt

NUM_COMPLETIONS = "num_completions"
_TEXTS = ("completion", "completions")
_PAIR = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
_NOT_OF_A_PAIR = {
    *(*_PAIR, *_TEXTS, NUM_COMPLETIONS, "score", "scores", "ranks", "margin", "target", "tie", "attributes"),
    *("chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids", "completions_ids"),
}
"""What says something of one completion, or of an order, and would be read as such of the new pair."""
Kind = Literal["rows", "best-of", "pairs"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What becomes of scored rows: all of them ("rows"), the best of each group, or a pair of each.

    `column` holds the scores. `min_score`: the least that a best one must have; `min_margin`: the least by
    which the best of a pair must be above the worst.
    """

    kind: Kind = "rows"
    column: str = "score"
    min_score: float | None = None
    min_margin: float | None = None

    def of(self, rows: Iterable[Mapping[str, Any]], dropped: Counter[str]) -> Iterator[Mapping[str, Any]]:
        """The rows to write; `dropped` counts the groups that are left out, by reason."""
        if self.kind == "rows":
            yield from rows
            return
        make: Callable[[_Group, Counter[str]], dict[str, Any] | None]
        make = self._best if self.kind == "best-of" else self._pair
        for group in _groups(rows, self.column):
            made = make(group, dropped)
            if made is not None:
                yield made

    def _best(self, group: _Group, dropped: Counter[str]) -> dict[str, Any] | None:
        if self.min_score is not None and group.best.score < self.min_score:
            dropped[f"best score below --min-score {self.min_score:g}"] += 1
            return None
        made: dict[str, Any] = {}
        for name, value in group.best.row.items():
            if name in _TEXTS:
                made["completion"] = group.best.text
            else:
                made[name] = value
        return {**made, self.column: group.best.score, NUM_COMPLETIONS: group.num_completions}

    def _pair(self, group: _Group, dropped: Counter[str]) -> dict[str, Any] | None:
        best, worst = group.best, group.worst
        margin = best.score - worst.score
        if group.num_completions < 2:
            reason = "one completion"
        elif margin <= 0:
            reason = "all scores are equal"
        elif best.text == worst.text:
            reason = "best and worst are the same text"
        elif self.min_margin is not None and margin < self.min_margin:
            reason = f"margin below --min-margin {self.min_margin:g}"
        else:
            prompt = {} if best.row.get("prompt") is None else {"prompt": best.row["prompt"]}
            made = {
                **prompt,
                "chosen": best.text,
                "rejected": worst.text,
                "chosen_score": best.score,
                "rejected_score": worst.score,
                **{
                    name: value
                    for name, value in best.row.items()
                    if name not in _NOT_OF_A_PAIR and name != self.column
                    if name in worst.row and worst.row[name] == value
                },
            }
            try:
                parse_row(made)
            except RowError as error:
                reason = f"no pair to train on ({error.reason})"
            else:
                return made
        dropped[reason] += 1
        return None

    def schema(self, rows: pa.Schema) -> pa.Schema:
        """The columns of what is written, by those of the rows that were scored.

        DataError: rows with `completion` beside rows with `completions`, whose scores have no one type.
        """
        fields = {field.name: field for field in rows if not pa.types.is_null(field.type)}
        text, several = fields.get("completion"), fields.get("completions")
        if several is not None and text is not None and self.kind == "rows":
            raise DataError(
                "some rows have `completion` and others `completions`: their scores are numbers and lists, "
                "and a parquet column has one type. Write --output FILE.jsonl, or score them apart."
            )
        kind = text.type if text is not None else several.type.value_type if several is not None else None
        kept = [field for field in rows if field.name not in (*_TEXTS, self.column)]
        number = pa.field(self.column, pa.float64())
        if self.kind == "rows":
            score = pa.field(self.column, pa.list_(pa.float64())) if several is not None else number
            return pa.schema([*(field for field in rows if field.name != self.column), score])
        if self.kind == "best-of":
            return pa.schema(
                [*kept, pa.field("completion", kind), number, pa.field(NUM_COMPLETIONS, pa.int64())]
            )
        return pa.schema(
            [
                *(field for field in rows if field.name == "prompt"),
                *(pa.field(name, kind) for name in ("chosen", "rejected")),
                *(pa.field(name, pa.float64()) for name in ("chosen_score", "rejected_score")),
                *(field for field in kept if field.name not in _NOT_OF_A_PAIR),
            ]
        )


@dataclass(slots=True)
class _Side:
    """A completion with its score, and the row that it comes from."""

    text: Any
    score: float
    row: Mapping[str, Any]


@dataclass(slots=True)
class _Group:
    best: _Side
    worst: _Side
    num_completions: int = 1

    def add(self, side: _Side) -> None:
        self.num_completions += 1
        if side.score > self.best.score:
            self.best = side
        if side.score < self.worst.score:
            self.worst = side


def _groups(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[_Group]:
    group: _Group | None = None
    last: Mapping[str, Any] = {}
    for row in rows:
        single = row.get("completions") is None
        texts = [row["completion"]] if single else row["completions"]
        scores = [row[column]] if single else row[column]
        sides = [_Side(text, score, row) for text, score in zip(texts, scores, strict=True)]
        goes_on = single and last.get("completions") is None and same_prompt(last, row)
        if group is None or not goes_on:
            if group is not None:
                yield group
            group = _Group(sides[0], sides[0])
            sides = sides[1:]
        for side in sides:
            group.add(side)
        last = row
    if group is not None:
        yield group
