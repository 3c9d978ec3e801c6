"""Rows of a file -> the same rows with a `score`: what `rayrm score` does, for any function that scores.

A row has `completion` (a string or a message list), or `completions` (a list of these: `score` is then a list
too), and a `prompt` before it unless the completion is the whole text; `tools` and `chat_template_kwargs`
mean what they mean in training. Rows travel in chunks, so that completions of one prompt share its
computation. The first row that cannot be scored ends it with a `ScoreError` that names its file and line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import TextInput
from rayrm.errors import DataError, ScoreError
from rayrm.serve.request import template_arguments

ROWS_PER_CHUNK = 256
Score = Callable[[list[TextInput]], list[float]]
Row = tuple[str, Any]
"""Where a row stands (`file:line`), and its content."""


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a jsonl, jsonl.gz or parquet file, in order. Raises `DataError` for what cannot be read."""
    for work in plan_sources(source, max_rows=None, name=source, contiguous=True).work:
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


def score_rows(rows: Iterable[Row], score: Score, *, rendered: bool = False) -> Iterator[dict[str, Any]]:
    """Each row with its `score`, in order.

    Raises:
        ScoreError: a row that is no (prompt, completion), or that the model cannot take; its line is named.
    """
    reader = iter(rows)
    while chunk := list(itertools.islice(reader, ROWS_PER_CHUNK)):
        inputs = [inputs_of_row(where, row, rendered=rendered) for where, row in chunk]
        scores = iter(_scored(chunk, inputs, score))
        for (_, row), entries in zip(chunk, inputs, strict=True):
            own = list(itertools.islice(scores, len(entries)))
            yield {**row, "score": own if _has(row, "completions") else own[0]}


def write_whole(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write the rows to `path` as jsonl, whole or not at all; returns their number."""
    aside = path.with_name(f".{path.name}.partial")
    num_rows = 0
    try:
        with aside.open("w", encoding="utf-8") as out:
            for row in rows:
                out.write(as_line(row))
                num_rows += 1
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
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


def _scored(chunk: Sequence[Row], inputs: Sequence[list[TextInput]], score: Score) -> list[float]:
    try:
        return score([entry for entries in inputs for entry in entries])
    except ScoreError:
        # Which row was it? Only this failing chunk is scored again, row by row.
        for (where, _), entries in zip(chunk, inputs, strict=True):
            try:
                score(entries)
            except ScoreError as error:
                raise ScoreError(f"{where}: {error}") from error
        raise
