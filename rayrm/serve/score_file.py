"""Rows of a file -> the same rows with a `score`: what `rayrm score` does, for any function that scores.

A row has `completion` (a string or a message list), or `completions` (a list of these: `score` is then a list
too), and a `prompt` before it unless the completion is the whole text; `tools` and `chat_template_kwargs`
mean what they mean in training. Rows travel in chunks, so that completions of one prompt share its
computation. A row that cannot be scored is a `ScoreError` that names its file and line: `score_rows` ends
with the first, `score_each` gives it in the place of the score. No column is overwritten.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, DataError, ScoreError
from rayrm.serve.request import template_arguments

ROWS_PER_CHUNK = 256
Score = Callable[[list[TextInput]], list[float]]
Row = tuple[str, Any]
"""Where a row stands (`file:line`), and its content."""
Outcome = float | list[float] | DataError | ScoreError
"""A row's score (a list of them for `completions`), or why it has none."""


def read_rows(source: str | Sequence[str]) -> Iterator[Row]:
    """The rows of jsonl, jsonl.gz or parquet files, in order. Raises `DataError` for what cannot be read."""
    name = source if isinstance(source, str) else ", ".join(source)
    for work in plan_sources(source, max_rows=None, name=name, contiguous=True).work:
        for row in read_work(work):
            if isinstance(row.content, DataError):
                raise DataError(f"{row.where}: {row.content}")
            yield row.where, row.content


def read_lines(stream: BinaryIO, name: str) -> Iterator[Row]:
    """The rows of an open jsonl stream, as they come."""
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            yield f"{name}:{number}", json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(f"{name}:{number}: the line is not JSON in UTF-8: {error}; correct it") from error


def score_rows(
    rows: Iterable[Row], score: Score, *, rendered: bool = False, column: str = "score"
) -> Iterator[dict[str, Any]]:
    """Each row with its score in `column`, in order.

    Raises:
        ScoreError: a row that is no (prompt, completion), or that the model cannot take; its line is named.
        ConfigError: a row that has such a column.
    """
    reader = iter(rows)
    while chunk := list(itertools.islice(reader, ROWS_PER_CHUNK)):
        outcomes = score_each(chunk, score, rendered=rendered, column=column)
        for (_, row), outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            yield {**row, column: outcome}


def score_each(
    chunk: Sequence[Row], score: Score, *, rendered: bool = False, column: str = "score"
) -> list[Outcome]:
    """What became of each row of a chunk, in order, computed together. ConfigError: a row has `column`."""
    outcomes: list[Outcome | None] = [None] * len(chunk)
    inputs: dict[int, list[TextInput]] = {}
    for place, (where, row) in enumerate(chunk):
        try:
            if isinstance(row, DataError):
                raise DataError(f"{where}: {row}")
            inputs[place] = inputs_of_row(where, row, rendered=rendered)
        except (DataError, ScoreError) as error:
            outcomes[place] = error
        else:
            if _has(row, column):
                raise ConfigError(
                    f"{where}: the row has a column {column!r} already, which is not overwritten. Type "
                    f"`--column NAME` for another one, such as --column {column}_2, or drop the column."
                )
    for place, found in _scored(chunk, inputs, score).items():
        several = not isinstance(found, ScoreError) and _has(chunk[place][1], "completions")
        outcomes[place] = found if several or isinstance(found, ScoreError) else found[0]
    return [outcome for outcome in outcomes if outcome is not None]


def write_whole(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write the rows to `path` as jsonl, whole or not at all; returns their number."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        num_rows = write_lines(rows, aside, compressed=path.suffix == ".gz")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return num_rows


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path, *, compressed: bool) -> int:
    """Write the rows as jsonl, by gzip if `compressed`; returns their number."""
    num_rows = 0
    with gzip.open(path, "wt", encoding="utf-8") if compressed else path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(as_line(row))
            num_rows += 1
    return num_rows


def as_line(row: Mapping[str, Any]) -> str:
    """One row as a line of jsonl."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def inputs_of_row(where: str, row: Any, *, rendered: bool) -> list[TextInput]:
    """What of the row is to be scored, one input for each completion. ScoreError names `where` it stands."""
    if not isinstance(row, Mapping):
        raise ScoreError(f"{where}: the row is {type(row).__name__}; it must be an object with `completion`.")
    one, several = _has(row, "completion"), _has(row, "completions")
    if one == several:
        raise ScoreError(f"{where}: {_what_instead(row, both=one)}")
    completions = row["completions"] if several else [row["completion"]]
    if not isinstance(completions, Sequence) or isinstance(completions, str) or not completions:
        raise ScoreError(f"{where}: `completions` must be a list of at least one completion.")
    prompt, tools = row.get("prompt"), row.get("tools")
    for name, text in [("prompt", prompt), *(("completion", text) for text in completions)]:
        if not (isinstance(text, str | list) or (name == "prompt" and text is None)):
            raise ScoreError(
                f"{where}: `{name}` ({text!r}) is {type(text).__name__}; it must be a string or a "
                "message list [{'role': ..., 'content': ...}]."
            )
    try:
        tools, options = template_arguments(tools, row.get("chat_template_kwargs"))
    except ScoreError as error:
        raise ScoreError(f"{where}: {error}") from error
    return [TextInput(prompt, completion, tools, options, rendered) for completion in completions]


def _has(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _what_instead(row: Mapping[str, Any], *, both: bool) -> str:
    if both:
        return "the row has `completion` and `completions`; keep one of them."
    if _has(row, "chosen"):
        return (
            "the row is a preference pair (`chosen`, `rejected`). For accuracy on pairs type `rayrm evaluate "
            "MODEL FILE`; to score each side give rows with `prompt` and `completions`."
        )
    return f"`completion` is missing (the row has {sorted(map(str, row))}); add it, or rename its key."


def _scored(
    chunk: Sequence[Row], inputs: Mapping[int, list[TextInput]], score: Score
) -> dict[int, list[float] | ScoreError]:
    """The scores of each row's inputs, by its place. Where rows are refused, halves are scored apart."""
    if not inputs:
        return {}
    try:
        scores = iter(score([entry for entries in inputs.values() for entry in entries]))
    except ScoreError as error:
        places = list(inputs)
        if len(places) == 1:
            named = ScoreError(f"{chunk[places[0]][0]}: {error}")
            named.__cause__ = error
            return {places[0]: named}
        middle = len(places) // 2
        return {
            place: outcome
            for half in (places[:middle], places[middle:])
            for place, outcome in _scored(chunk, {place: inputs[place] for place in half}, score).items()
        }
    return {place: list(itertools.islice(scores, len(entries))) for place, entries in inputs.items()}
