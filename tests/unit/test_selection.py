"""Which rows a set takes: a split by prompt that no order can change, and prompts left out by their text."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.data.blocks import index_of, tokenized_tables
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.selection import Selection, excluded_prompts, normalised, prompt_hash, prompt_of
from rayrm.data.sources import SourceRow
from rayrm.errors import DataError
from tests.tiny import tiny_rankings, tiny_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ASK = [{"role": "user", "content": "Why is the sky blue?"}]
HH = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def prompt(row: dict[str, Any]) -> str:
    return prompt_of(parse_row(row))


def several_pairs_of_each_prompt() -> list[dict[str, Any]]:
    """900 rows of 300 prompts, in all text forms."""
    rows = []
    for number in range(3):
        for form, conversational in enumerate((False, True)):
            for row in tiny_rows(150, seed=form, conversational=conversational):
                better = f" {number} yes"
                rows.append({**row, "chosen": said(better) if conversational else better})
    return rows


def part_of(row: PreferenceRow, fraction: float) -> str:
    left_out = {part: Selection(part, fraction).reason(row) for part in ("train", "eval")}  # type: ignore[arg-type]
    (taken,) = [part for part, reason in left_out.items() if reason is None]
    assert set(left_out.values()) == {None, "held-out"}
    return taken


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.9])
def test_no_prompt_is_on_both_sides_and_the_share_is_the_fraction(fraction: float) -> None:
    sides: dict[str, set[str]] = {}
    for row in several_pairs_of_each_prompt():
        parsed = parse_row(row)
        sides.setdefault(prompt_of(parsed), set()).add(part_of(parsed, fraction))
    assert len(sides) == 300
    assert all(len(side) == 1 for side in sides.values())
    num_eval = sum(side == {"eval"} for side in sides.values())
    # Four standard deviations of a binomial count.
    assert abs(num_eval - 300 * fraction) < 4 * (300 * fraction * (1 - fraction)) ** 0.5


def test_the_side_is_the_same_in_another_order_and_in_another_process(tmp_path: Path) -> None:
    rows = several_pairs_of_each_prompt()
    here = {json.dumps(row): part_of(parse_row(row), 0.3) for row in rows}
    random.Random(1).shuffle(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = """
import json, sys
from rayrm.data.preference import parse_row
from rayrm.data.selection import Selection
for line in open(sys.argv[1]):
    print(Selection("eval", 0.3).reason(parse_row(json.loads(line))) or "eval")
"""
    words = [sys.executable, "-c", script, str(tmp_path / "rows.jsonl")]
    there = subprocess.run(words, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    wanted = ["eval" if here[json.dumps(row)] == "eval" else "held-out" for row in rows]
    assert there.stdout.split() == wanted


def test_the_split_is_fixed_for_all_versions() -> None:
    """A changed hash would move rows from one side to the other of runs that exist."""
    known = hashlib.blake2b(b"why is the sky blue", digest_size=8).digest()
    assert prompt_hash("  Why is THE sky\nblue?? ") == int.from_bytes(known, "big")


@pytest.mark.parametrize("part", ["all", "train", "eval"])
def test_without_a_fraction_every_part_is_everything(part: Any) -> None:
    assert {Selection(part).reason(parse_row(row)) for row in tiny_rows(50)} == {None}


def test_an_implicit_prompt_is_what_an_explicit_one_says() -> None:
    for conversational in (False, True):
        given = tiny_rows(40, conversational=conversational)
        held = tiny_rows(40, conversational=conversational, explicit_prompt=False)
        for explicit, implicit in zip(given, held, strict=True):
            if conversational:
                assert prompt(implicit) == prompt(explicit)
            else:  # strings without turns: what the completions share, at least the prompt's whole words
                assert normalised(prompt(implicit)).startswith(normalised(prompt(explicit)))


def test_a_users_question_is_one_prompt_as_string_and_as_message() -> None:
    text = {"prompt": "Why is the sky blue?", "chosen": "a", "rejected": "b"}
    messages = {"chosen": [*ASK, *said("a")], "rejected": [*ASK, *said("b")]}
    assert prompt(text) == prompt(messages) == "Why is the sky blue?"
    system = [{"role": "system", "content": "Be brief."}, *ASK]
    assert prompt({"prompt": system, "chosen": said("a"), "rejected": said("b")}) == (
        "system: Be brief.\nuser: Why is the sky blue?"
    )


def test_answers_that_begin_alike_do_not_change_a_dialogues_prompt() -> None:
    for chosen, rejected in (
        (" Yes, it is.", " Yes, of course."),
        (" No.", " Never."),
        (" Sure", " Sure thing"),
    ):
        assert prompt({"chosen": HH + chosen, "rejected": HH + rejected}) == HH
    plain = {"chosen": "the cat sat on it", "rejected": "the cat sang on it"}
    assert prompt(plain) == "the cat "


def test_a_dialogue_that_goes_on_from_anothers_end_has_the_prompt_before_it() -> None:
    longer = [*ASK, *said("a"), {"role": "user", "content": "and?"}, *said("b")]
    assert prompt({"chosen": longer, "rejected": longer[:2]}) == "Why is the sky blue?"


def test_ids_are_told_by_what_they_share_and_rows_that_share_nothing_by_themselves() -> None:
    assert prompt({"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}) == "5 6"
    rows = [{"chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(50)]
    assert len({prompt(row) for row in rows}) == 50
    swapped = {"chosen": "no 3", "rejected": "yes 3"}
    assert prompt(swapped) == prompt(rows[3])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why is the sky blue?", "why   is\tthe SKY blue"),
        ("Don\u2019t stop -- please!", "don't stop, please"),
        ("\uff37\uff48\uff59 \u2460", "Why 1"),
        ("Stra\u00dfe", "STRASSE"),
        ("a\u00adb", "ab"),
        ("**Name** three _colours_.", "name three colours"),
    ],
)
def test_spellings_of_one_prompt_have_one_hash(one: str, other: str) -> None:
    assert prompt_hash(one) == prompt_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 * 4?", "What is 3 / 4?"),
        ("2+2", "2-2"),
        ("2 - 2", "2 2"),
        ("a < b", "a > b"),
        ("now here", "nowhere"),
        ("?!", "!"),
        ("\u0915\u093f", "\u0915\u0940"),  # a vowel sign is no punctuation
    ],
)
def test_other_prompts_have_other_hashes(one: str, other: str) -> None:
    assert prompt_hash(one) != prompt_hash(other)


def test_a_prompt_is_excluded_in_any_spelling_and_no_other_is(tmp_path: Path) -> None:
    rows = tiny_rows(60)
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": f"  {rows[3]['prompt'].upper()}!! "})
        + "\n"
        + json.dumps({"chosen": [*ASK, *said("a")], "rejected": [*ASK, *said("b")]})
    )
    selection = Selection("all", 0.0, excluded_prompts(str(tmp_path / "prompts.jsonl")))
    reasons = [selection.reason(parse_row(row)) for row in rows]
    assert reasons == [None] * 3 + ["excluded-prompt"] + [None] * 56
    asked = {"prompt": "why is the sky blue", "chosen": "a", "rejected": "b"}
    assert selection.reason(parse_row(asked)) == "excluded-prompt"
    copied = pickle.loads(pickle.dumps(selection))
    assert copied.excluded.tolist() == selection.excluded.tolist() == sorted(selection.excluded.tolist())


def test_excluded_prompts_are_read_by_the_sources_own_column_names() -> None:
    rows = [{"question": "the cat?", "prompt": 7}]
    assert excluded_prompts(rows, {"prompt": "question"}).tolist() == [prompt_hash("the cat")]


def test_a_source_to_exclude_without_prompts_is_an_error_and_one_unread_row_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(DataError, match=r"(?s)no row with a prompt.*`prompt` column"):
        excluded_prompts([{"text": "the cat"}])
    with caplog.at_level(logging.WARNING, logger="rayrm.data"):
        assert len(excluded_prompts([{"text": "the cat"}, {"prompt": "the cat"}])) == 1
    assert "1 rows" in caplog.text
    assert "exclude_prompts_of[0]" in caplog.text


def tables(rows: list[dict[str, Any]], selection: Selection) -> Any:
    numbered = [SourceRow(0, number, f"rows[{number}]", row) for number, row in enumerate(rows)]
    (table,) = tokenized_tables(numbered, TOKENIZER, None, selection=selection)
    return table


def test_the_two_parts_of_a_table_are_its_rows_each_once_and_all_are_counted() -> None:
    rows: list[Any] = [*tiny_rows(80), *tiny_rankings(40), {"chosen": "only"}]
    parts = {part: index_of(tables(rows, Selection(part, 0.3))) for part in ("train", "eval")}  # type: ignore[arg-type]
    taken = [set(index.row.tolist()) for index in parts.values()]
    assert taken[0] | taken[1] == set(range(120))
    assert not taken[0] & taken[1]
    assert min(map(len, taken)) > 20
    for index in parts.values():
        assert index.num_rows == 121
        assert index.num_rows_of == {0: 121}
        assert index.num_held_out == {0: 120 - len(index.row)}
        assert [refusal.reason for refusal in index.refusals] == ["missing-rejected"]


def test_a_held_out_row_leaves_its_place_and_nothing_else_in_the_table() -> None:
    records = tables(tiny_rows(50), Selection("eval", 0.1)).to_pylist()
    held_out = [record for record in records if record["reason"] == "held-out"]
    assert len(held_out) > 30
    assert {(len(record["ids"]), record["raw"]) for record in held_out} == {(0, "")}


def test_a_row_with_an_excluded_prompt_is_kept_with_its_reason_and_its_text() -> None:
    rows = tiny_rows(20)
    excluded = np.array(sorted(prompt_hash(row["prompt"]) for row in rows[4:6]), np.uint64)
    index = index_of(tables(rows, Selection("train", 0.0, excluded)))
    assert [(refusal.row, refusal.reason) for refusal in index.refusals] == [
        (4, "excluded-prompt"),
        (5, "excluded-prompt"),
    ]
    assert json.loads(index.refusals[0].raw) == rows[4]
    assert "exclude_prompts_of" in index.refusals[0].message
    assert index.num_held_out == {}
