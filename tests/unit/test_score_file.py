"""Rows in, the same rows with a score out; a row that cannot be scored is named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, DataError, RowError, ScoreError
from rayrm.serve.score_file import (
    ROWS_PER_CHUNK,
    read_lines,
    read_rows,
    score_each,
    score_rows,
    write_whole,
)


def lengths(inputs: list[TextInput]) -> list[float]:
    """A stand-in for a model: the completion's length; it refuses the word "bad"."""
    if any(entry.completion == "bad" for entry in inputs):
        raise ScoreError("this word is refused")
    return [float(len(entry.completion)) for entry in inputs]


def rows_of(*contents: Any) -> list[tuple[str, Any]]:
    return [(f"rows.jsonl:{number}", content) for number, content in enumerate(contents, start=1)]


def test_completion_gives_a_number_and_completions_a_list_and_all_else_stays() -> None:
    rows = rows_of({"id": 1, "prompt": "p", "completion": "abc"}, {"completions": ["a", "ab"], "score": None})
    assert list(score_rows(rows, lengths)) == [
        {"id": 1, "prompt": "p", "completion": "abc", "score": 3.0},
        {"completions": ["a", "ab"], "score": [1.0, 2.0]},
    ]


def test_a_column_that_is_there_is_not_overwritten_and_another_can_be_named() -> None:
    rows = rows_of({"completion": "a"}, {"completion": "ab", "score": "old"})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: .*'score'.*--column NAME"):
        list(score_rows(rows, lengths))
    assert list(score_rows(rows, lengths, column="length"))[1] == {
        "completion": "ab",
        "score": "old",
        "length": 2.0,
    }


def test_each_row_of_a_chunk_has_its_score_or_its_refusal_whichever_are_refused() -> None:
    for bad in ({0}, {3}, {1, 2}, {0, 4, 7}, set(range(8)), set()):
        rows = rows_of(*({"completions": ["bad" if n in bad else "x" * n, "y"]} for n in range(8)))
        outcomes = score_each(rows, lengths)
        assert {n for n, outcome in enumerate(outcomes) if isinstance(outcome, ScoreError)} == bad
        assert all(str(outcomes[n]).startswith(f"rows.jsonl:{n + 1}: ") for n in bad)
        assert all(outcomes[n] == [n, 1.0] for n in set(range(8)) - bad)
    assert score_each([("a:1", RowError("bad-json", "no JSON"))], lengths)[0].args == ("a:1: no JSON",)  # type: ignore[union-attr]


def test_more_rows_than_a_chunk_keep_their_order() -> None:
    rows = rows_of(*({"completion": "x" * (number % 7 + 1)} for number in range(2 * ROWS_PER_CHUNK + 3)))
    assert [row["score"] for row in score_rows(rows, lengths)] == [
        float(number % 7 + 1) for number in range(len(rows))
    ]


def test_tools_and_template_settings_reach_the_input() -> None:
    seen: list[TextInput] = []

    def record(inputs: list[TextInput]) -> list[float]:
        seen.extend(inputs)
        return [0.0] * len(inputs)

    row = {"completion": "a", "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"x": 1}}
    list(score_rows(rows_of(row), record, rendered=True))
    assert seen == [TextInput(None, "a", [{"name": "f"}], {"x": 1}, rendered=True)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "rayrm evaluate"),
        ({"prompt": "p", "response": "a"}, "`completion` is missing (the row has ['prompt', 'response'])"),
        ({"completion": "a", "completions": ["a"]}, "keep one"),
        ({"completions": []}, "at least one"),
        ({"completions": "abc"}, "must be a list"),
        ({"completion": 3}, "`completion` (3) is int"),
        ({"prompt": 3, "completion": "a"}, "`prompt` (3) is int"),
        ({"completion": "a", "tools": "{"}, "`tools` ('{') is not JSON"),
        (["a"], "must be an object"),
        ({"completion": "bad"}, "this word is refused"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_with_what_is_wrong(row: Any, said: str) -> None:
    with pytest.raises(ScoreError) as refusal:
        list(score_rows(rows_of({"completion": "a"}, row), lengths))
    assert str(refusal.value).startswith("rows.jsonl:2: ")
    assert said in str(refusal.value)


def test_files_are_read_plain_and_compressed_and_a_bad_line_is_named(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text('{"n": 1}\n\n{"n": 2}\n{oops\n')
    packed.write_bytes(gzip.compress(b'{"n": 1}\n'))
    assert list(read_rows(str(packed))) == [(f"{packed}:1", {"n": 1})]
    reader = read_rows(str(plain))
    assert [next(reader), next(reader)] == [(f"{plain}:1", {"n": 1}), (f"{plain}:3", {"n": 2})]
    with pytest.raises(DataError, match=r"a\.jsonl:4: .*not JSON"):
        next(reader)


def test_a_stream_is_read_line_by_line_and_a_bad_line_is_named() -> None:
    reader = read_lines(io.BytesIO(b'{"n": 1}\n\n\xff\n'), "stdin")
    assert next(reader) == ("stdin:1", {"n": 1})
    with pytest.raises(DataError, match="stdin:3"):
        next(reader)


def test_a_failure_midway_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    with pytest.raises(ScoreError):
        write_whole(score_rows(rows_of({"completion": "bad"}), lengths), out)
    assert out.read_text() == "before\n"
    assert write_whole(score_rows(rows_of({"completion": "é"}), lengths), out) == 1
    assert json.loads(out.read_text()) == {"completion": "é", "score": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
