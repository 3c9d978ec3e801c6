"""Rows of every accepted form become pairs; every other row is refused by name, with what to type."""

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
        assert (pair.prompt, pair.chosen, pair.rejected) == (
            row.get("prompt"),
            row["chosen"],
            row["rejected"],
        )
        assert pair.margin == row["margin"]


def test_token_ids_win_over_text_and_may_be_arrays() -> None:
    pair = parse_row({"chosen": "a", "rejected": "b", "chosen_ids": np.array([5, 6]), "rejected_ids": (5, 7)})
    assert form_of(pair) == "tokenized"
    assert (pair.chosen, pair.chosen_ids, pair.rejected_ids) == (None, [5, 6], [5, 7])


def test_legacy_id_columns_are_read_and_warned_about_once() -> None:
    preference._warn_legacy_columns.cache_clear()
    row = {"chosen_input_ids": [1], "rejected_input_ids": [2]}
    with pytest.warns(FutureWarning, match="rename the columns"):
        assert parse_row(row).chosen_ids == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_row(row).rejected_ids == [2]


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
    assert pair.chosen == ASK + YES
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
    assert pair.chosen == [with_none, *turns]
    assert pair.rejected == [with_none]


def test_unknown_columns_are_ignored() -> None:
    assert parse_row({"chosen": "a", "rejected": "b", "source": 3}) == parse_row(
        {"chosen": "a", "rejected": "b"}
    )


TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": ASK, "chosen": YES, "rejected": NO}


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
        ({**TEXT, "margin": "0.5"}, "bad-margin", "'0.5'"),
        ({**TEXT, "margin": True}, "bad-margin", "True"),
        ({**CHAT, "tools": "{"}, "bad-tools", "JSON"),
        ({**CHAT, "tools": {"name": "look"}}, "bad-tools", "wrap a single tool"),
        ({**CHAT, "chat_template_kwargs": "x"}, "bad-template-kwargs", "'x'"),
        ({**CHAT, "chat_template_kwargs": {"tokenize": False}}, "bad-template-kwargs", "tokenize"),
        ({**TEXT, "chosen": "a\ud800"}, "not-utf8", "character 1"),
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
