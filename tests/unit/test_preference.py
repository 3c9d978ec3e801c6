"""Rows of every accepted form become pairs or rankings; all others are refused by name, with what to type."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from rayrm.data import preference
from rayrm.data.preference import form_of, parse_row
from rayrm.errors import RowError
from tests.tiny import tiny_rows

ASK = [{"role": "user", "content": "why?"}]
YES = [{"role": "assistant", "content": "because"}]
NO = [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit_prompt", [False, True])
def test_each_of_the_four_text_forms_keeps_its_texts(conversational: bool, explicit_prompt: bool) -> None:
    for row in tiny_rows(5, conversational=conversational, explicit_prompt=explicit_prompt, margin=True):
        pair = parse_row(row)
        assert form_of(pair) == ("conversational" if conversational else "standard")
        assert (pair.prompt, pair.completions) == (row.get("prompt"), (row["chosen"], row["rejected"]))
        assert pair.ranks == (0, 1)
        assert pair.margin == row["margin"]


def test_token_ids_win_over_text_and_may_be_arrays() -> None:
    pair = parse_row({"chosen": "a", "rejected": "b", "chosen_ids": np.array([5, 6]), "rejected_ids": (5, 7)})
    assert form_of(pair) == "tokenized"
    assert (pair.completions, pair.ids, pair.ranks) == ((), ([5, 6], [5, 7]), (0, 1))


def test_legacy_id_columns_are_read_and_warned_about_once() -> None:
    preference._warn_legacy_columns.cache_clear()
    row = {"chosen_input_ids": [1], "rejected_input_ids": [2]}
    with pytest.warns(FutureWarning, match="rename the columns"):
        assert parse_row(row).ids == ([1], [2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_row(row).ids == ([1], [2])


def test_fields_that_arrow_filled_with_none_count_as_absent() -> None:
    row: dict[str, Any] = {
        "prompt": None,
        "chosen": [{"role": "user", "content": "why?", "name": None}, {**YES[0], "tool_calls": None}],
        "rejected": ASK + NO,
        "margin": None,
        "tools": None,
        "chat_template_kwargs": {"enable_thinking": None, "style": "x"},
        "chosen_ids": None,
    }
    pair = parse_row(row)
    assert pair.completions[0] == ASK + YES
    assert (pair.prompt, pair.margin, pair.tools) == (None, 0.0, None)
    assert pair.chat_template_kwargs == {"style": "x"}


def test_tools_are_the_same_as_list_and_as_json() -> None:
    row = {"prompt": ASK, "chosen": YES, "rejected": NO}
    as_list = parse_row({**row, "tools": [{"name": "look"}]})
    assert as_list.tools == parse_row({**row, "tools": '[{"name": "look"}]'}).tools == [{"name": "look"}]
    assert parse_row({**row, "tools": "null"}).tools is None


def test_a_tool_call_needs_no_content_and_dialogues_may_have_tool_turns() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    with_none = {**call, "content": None}
    turns = [{"role": "tool", "content": "3"}, *YES]
    pair = parse_row({"prompt": ASK, "chosen": [call, *turns], "rejected": [with_none]})
    assert pair.completions == ([with_none, *turns], [with_none])


def test_a_ranking_keeps_its_completions_in_order_and_its_ranks_without_gaps() -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [3, -1.5, 3, 2], "margin": 0.5}
    ranking = parse_row(row)
    assert (ranking.prompt, ranking.completions, ranking.margin) == ("p", ("a", "b", "c", "d"), 0.5)
    assert ranking.ranks == (2, 0, 2, 1)
    assert (
        parse_row({**row, "completions": np.array(list("abcd")), "ranks": np.array([3, -1.5, 3, 2])})
        == ranking
    )


def test_a_ranking_may_be_messages_whole_dialogues_or_token_ids() -> None:
    ranks = {"ranks": [1, 0], "chosen": None, "rejected": None}
    told = parse_row({"prompt": ASK, "completions": [NO, YES], **ranks})
    assert (form_of(told), told.completions) == ("conversational", (NO, YES))
    whole = parse_row({"completions": [ASK + NO, ASK + YES], **ranks})
    assert (whole.prompt, whole.completions) == (None, (ASK + NO, ASK + YES))
    ids = parse_row({"completions": ["a"], "completions_ids": [[5, 6], [5, 7]], **ranks})
    assert (form_of(ids), ids.ids, ids.ranks) == ("tokenized", ([5, 6], [5, 7]), (1, 0))


@pytest.mark.parametrize(
    "other", [{"completions": ["c", "d"]}, {"ranks": [1, 2]}, {"completions_ids": [[1]]}]
)
def test_half_a_ranking_beside_a_pair_is_another_column(other: dict[str, Any]) -> None:
    assert parse_row({**TEXT, **other}) == parse_row(TEXT)


def test_unknown_columns_are_ignored() -> None:
    assert parse_row({"chosen": "a", "rejected": "b", "source": 3}) == parse_row(
        {"chosen": "a", "rejected": "b"}
    )


@pytest.mark.parametrize("empty", [None, []])
def test_a_row_without_an_image_may_stand_in_a_set_with_a_column_of_them(empty: Any) -> None:
    assert parse_row({**TEXT, "images": empty, "audio": empty}) == parse_row(TEXT)


TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": ASK, "chosen": YES, "rejected": NO}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]}


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ([1, 2], "not-an-object", "[1, 2]"),
        ({"rejected": "b"}, "missing-chosen", "`chosen`"),
        ({"chosen": "b", "rejected": None}, "missing-rejected", "`rejected`"),
        ({"chosen_ids": [1]}, "missing-rejected", "`rejected_ids`"),
        ({**TEXT, "chosen": 7}, "wrong-type", "`chosen` (7)"),
        ({**TEXT, "chosen": b"bytes"}, "wrong-type", "bytes"),
        ({**CHAT, "chosen": ["a"]}, "wrong-type", "`chosen[0]` ('a')"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": 3}]}, "wrong-type", "`chosen[0].content` (3)"),
        (
            {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "wrong-type",
            "only text",
        ),
        ({"chosen_ids": [1, "x"], "rejected_ids": [1]}, "wrong-type", "`chosen_ids`"),
        ({"chosen_ids": [1, -1], "rejected_ids": [1]}, "wrong-type", "`chosen_ids`"),
        ({"chosen_ids": [True], "rejected_ids": [1]}, "wrong-type", "`chosen_ids`"),
        ({**TEXT, "chosen": "  \n"}, "empty-completion", "`chosen` ('  \\n')"),
        ({**CHAT, "rejected": []}, "empty-completion", "`rejected`"),
        ({**CHAT, "rejected": [{"role": "assistant", "content": " "}]}, "empty-completion", "`rejected[0]"),
        ({"chosen_ids": [], "rejected_ids": [1]}, "empty-completion", "`chosen_ids`"),
        ({**CHAT, "chosen": [{"role": "robot", "content": "a"}]}, "bad-roles", "'robot'"),
        ({**CHAT, "chosen": [{"content": "a"}]}, "bad-roles", "add the role"),
        ({**CHAT, "chosen": [{"from": "gpt", "value": "a"}]}, "bad-roles", "ShareGPT"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "bad-roles", "`content`"),
        ({**CHAT, "chosen": ASK + YES}, "bad-roles", "move what comes before it to `prompt`"),
        ({"chosen": ASK + YES + ASK, "rejected": ASK + NO}, "bad-roles", "ends with"),
        ({**CHAT, "rejected": "b"}, "mixed-forms", "`rejected` is a string"),
        ({**CHAT, "prompt": "p"}, "mixed-forms", "`prompt` is a string"),
        ({**TEXT, "margin": float("nan")}, "bad-margin", "nan"),
        ({**TEXT, "margin": float("inf")}, "bad-margin", "inf"),
        ({**TEXT, "margin": 1e39}, "bad-margin", "1e+39"),
        ({**TEXT, "margin": "0.5"}, "bad-margin", "'0.5'"),
        ({**TEXT, "margin": True}, "bad-margin", "True"),
        ({**CHAT, "tools": "{"}, "bad-tools", "JSON"),
        ({**CHAT, "tools": {"name": "look"}}, "bad-tools", "wrap a single tool"),
        ({**CHAT, "chat_template_kwargs": "x"}, "bad-template-kwargs", "'x'"),
        ({**CHAT, "chat_template_kwargs": {"tokenize": False}}, "bad-template-kwargs", "tokenize"),
        ({**TEXT, "chosen": "a\ud800"}, "not-utf8", "character 1"),
        ({**RANKED, "ranks": None}, "missing-ranks", "`ranks` is missing beside `completions`"),
        ({**RANKED, "completions": None}, "missing-completions", "`completions` is missing beside `ranks`"),
        ({**RANKED, **TEXT}, "mixed-forms", "`chosen` and also `completions`"),
        ({**RANKED, "rejected_ids": [1]}, "mixed-forms", "`rejected_ids` and also `completions`"),
        ({**RANKED, "completions": "abc"}, "wrong-type", "`completions` ('abc')"),
        ({**RANKED, "completions": ["a", 7, "c"]}, "wrong-type", "`completions[1]` (7)"),
        ({**RANKED, "completions": ["a"]}, "too-few-completions", "has 1"),
        ({**RANKED, "completions": ["a", YES, "c"]}, "mixed-forms", "`completions[1]` is a message list"),
        ({**RANKED, "completions": ["a", "b", " "]}, "empty-completion", "`completions[2]`"),
        ({"completions_ids": [[1], []], "ranks": [0, 1]}, "empty-completion", "`completions_ids[1]`"),
        ({**RANKED, "ranks": [0, 1]}, "bad-ranks", "3 numbers"),
        ({**RANKED, "ranks": 3}, "bad-ranks", "`ranks` (3)"),
        ({**RANKED, "ranks": [0, 1, float("nan")]}, "bad-ranks", "nan"),
        ({**RANKED, "ranks": [0, 1, None]}, "bad-ranks", "None"),
        ({**RANKED, "ranks": ["1", "2", "3"]}, "bad-ranks", "'1'"),
        ({**RANKED, "ranks": [True, False, False]}, "bad-ranks", "True"),
        ({**RANKED, "ranks": [4, 4, 4.0]}, "all-tied", "nothing is compared"),
        ({**CHAT, "images": [b"png"]}, "not-text", "`images` (list)"),
        ({**TEXT, "image": {"bytes": b"png", "path": None}}, "not-text", "`image` (dict)"),
        ({**RANKED, "video": "clip.mp4"}, "not-text", "`video` (str)"),
        ({"chosen_ids": [1], "rejected_ids": [2], "audio": [0.5]}, "not-text", "only text can be scored"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": "\udfff"}]}, "not-utf8", "`chosen[0].content`"),
    ],
)
def test_a_bad_row_is_refused_by_name_and_the_message_says_what_and_why(
    row: Any, reason: str, says: str
) -> None:
    with pytest.raises(RowError) as refusal:
        parse_row(row)
    assert refusal.value.reason == reason
    assert says in str(refusal.value)
    assert ";" in str(refusal.value)  # ... and, after the rule, what to do


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(RowError) as refusal:
        parse_row({**TEXT, "margin": "9" * 10_000})
    assert len(str(refusal.value)) < 300
