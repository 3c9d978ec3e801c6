"""Best of N, pairs, and the chunks that keep a prompt together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from rayrm.data.pieces import SourceRow
from rayrm.data.preference import parse_row
from rayrm.errors import DataError, RowError
from rayrm.evaluation.best_of import Selection
from rayrm.evaluation.score_chunks import MOST_TEXTS_PER_CHUNK, TEXTS_PER_CHUNK, chunks_of


def selected(rows: list[dict[str, Any]], kind: Any, **told: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    dropped: Counter[str] = Counter()
    return [dict(row) for row in Selection(kind, **told).of(iter(rows), dropped)], dropped


GROUP = {"id": 7, "prompt": "p", "completions": ["a", "b", "c", "d"], "score": [0.5, 2.0, -1.0, 2.0]}


def flat(prompt: str | None, *scored: tuple[str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": text, "score": score, **more} for text, score in scored]


def test_the_best_of_a_list_is_its_first_highest_score_with_the_other_columns() -> None:
    rows, dropped = selected([GROUP], "best-of")
    assert rows == [{"id": 7, "prompt": "p", "completion": "b", "score": 2.0, "num_completions": 4}]
    assert not dropped


def test_consecutive_rows_of_one_prompt_are_one_group_and_a_prompt_that_returns_is_another() -> None:
    rows = [
        *flat("p", ("a", 1.0), ("b", 3.0), ("c", 3.0)),
        *flat("q", ("d", 0.0)),
        *flat("p", ("e", -1.0), ("f", -2.0)),
        *flat("p", ("g", 9.0), tools=[{"name": "t"}]),
        *flat(None, ("h", 1.0), ("i", 2.0)),
    ]
    best, _ = selected(rows, "best-of")
    assert [(row["completion"], row["score"], row["num_completions"]) for row in best] == [
        ("b", 3.0, 3),
        ("d", 0.0, 1),
        ("e", -1.0, 2),
        ("g", 9.0, 1),
        ("h", 1.0, 1),
        ("i", 2.0, 1),
    ]


def test_a_least_score_drops_prompts_and_counts_them() -> None:
    rows, dropped = selected([GROUP, {**GROUP, "score": [0.0] * 4}], "best-of", min_score=0.5)
    assert len(rows) == 1
    assert dropped == {"best score below --min-score 0.5": 1}


def test_a_pair_is_best_against_worst_and_trains() -> None:
    said = {"tools": [{"name": "t"}], "margin": 3.0, "ranks": [1, 2, 3, 4], "scores": [1, 2, 3, 4]}
    rows, dropped = selected([{**GROUP, **said}], "pairs")
    assert rows == [
        {
            "prompt": "p",
            "chosen": "b",
            "rejected": "c",
            "chosen_score": 2.0,
            "rejected_score": -1.0,
            "id": 7,
            "tools": [{"name": "t"}],
        }
    ]
    assert not dropped
    parsed = parse_row(rows[0])
    assert (parsed.prompt, parsed.completions, parsed.margin) == ("p", ("b", "c"), 0.0)


def test_a_pair_of_flat_rows_keeps_what_both_say() -> None:
    rows = [
        {"prompt": "p", "completion": "a", "score": 1.0, "id": 1, "topic": "x"},
        {"prompt": "p", "completion": "b", "score": 0.0, "id": 2, "topic": "x"},
    ]
    (pair,), _ = selected(rows, "pairs")
    assert pair == {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chosen_score": 1.0,
        "rejected_score": 0.0,
        "topic": "x",
    }


def test_what_is_no_pair_is_dropped_and_counted_by_reason() -> None:
    rows = [
        *flat("one", ("a", 1.0)),
        {"prompt": "same text", "completions": ["a", "b", "a"], "score": [1.0, 0.9, 0.8]},
        {"prompt": "equal", "completions": ["a", "b"], "score": [1.0, 1.0]},
        {"prompt": "close", "completions": ["a", "b"], "score": [1.0, 0.6]},
        {"prompt": "at the margin", "completions": ["a", "b"], "score": [1.0, 0.5]},
        {"prompt": "empty", "completions": ["a", ""], "score": [1.0, 0.0]},
    ]
    pairs, dropped = selected(rows, "pairs", min_margin=0.5)
    assert [pair["prompt"] for pair in pairs] == ["at the margin"]
    assert dropped == {
        "one completion": 1,
        "best and worst are the same text": 1,
        "all scores are equal": 1,
        "margin below --min-margin 0.5": 1,
        "no pair to train on (empty-completion)": 1,
    }


def test_the_columns_of_parquet_keep_their_types() -> None:
    text = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("id", pa.int32()), ("prompt", text), ("completions", pa.list_(text))])
    assert Selection().schema(schema).field("score").type == pa.list_(pa.float64())
    best = Selection("best-of", column="rm").schema(schema)
    assert [best.field(name).type for name in ("id", "prompt", "completion", "rm", "num_completions")] == [
        pa.int32(),
        text,
        text,
        pa.float64(),
        pa.int64(),
    ]
    pairs = Selection("pairs").schema(schema)
    assert pairs.names == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "id"]
    assert pairs.field("chosen").type == text
    with pytest.raises(DataError, match="score them apart"):
        Selection().schema(schema.append(pa.field("completion", text)))


def source_rows(*contents: Any) -> list[SourceRow]:
    return [SourceRow(0, number, f"a:{number}", content) for number, content in enumerate(contents)]


def test_chunks_are_the_rows_in_order_and_the_same_each_time() -> None:
    rows = source_rows(*({"prompt": f"p{n // 3}", "completion": str(n)} for n in range(2000)))
    chunks = list(chunks_of(4, rows))
    assert [row for chunk in chunks for row in chunk.rows] == rows
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.piece for chunk in chunks} == {4}
    assert chunks == list(chunks_of(4, iter(rows)))
    assert list(chunks_of(4, [])) == []


def test_a_prompt_stays_in_one_chunk_up_to_a_bound() -> None:
    rows = source_rows(*({"prompt": f"p{n // 100}", "completion": str(n)} for n in range(600)))
    assert [len(chunk.rows) for chunk in chunks_of(0, rows)] == [300, 300]
    rows = source_rows(*({"prompt": "p", "completion": str(n)} for n in range(1500)))
    assert [len(chunk.rows) for chunk in chunks_of(0, rows)] == [MOST_TEXTS_PER_CHUNK, 476]
    listed = source_rows(*({"prompt": "p", "completions": ["x"] * 64} for _ in range(40)))
    assert len(next(chunks_of(0, listed)).rows) == MOST_TEXTS_PER_CHUNK // 64
    bad = source_rows(*([RowError("bad-json", "no")] * 300), {"completion": "a"}, None)
    assert [len(chunk.rows) for chunk in chunks_of(0, bad)] == [TEXTS_PER_CHUNK, 46]
