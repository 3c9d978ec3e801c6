"""Harmless changes are harmless (no word is lost), and what is said of a model under them is what it did."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.tokenize import TextInput
from rayrm.evaluation.consistency import (
    CHANGES,
    Consistency,
    consistency_of,
    kept_share,
    measure_consistency,
    question_of,
)
from rayrm.evaluation.style import swap_style, with_bullets, without_markdown
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_rankings, tiny_rows

MARKDOWN = """# The *old* house

It has **two** doors and __no__ windows:
- a **red _small_ door**
* a blue one
  + with a `**key**`

1. open it
2. sit

```python
# a comment
x = a**b**c
- 1
```
### End ###
"""
PLAIN = """The old house

It has two doors and no windows:
a red small door
a blue one
  with a `**key**`

1. open it
2. sit

```python
# a comment
x = a**b**c
- 1
```
End
"""


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def pair(chosen: Any, rejected: Any, prompt: Any = "why?") -> PreferenceRow:
    return parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})


# Style


def test_markdown_is_taken_off_and_code_stays() -> None:
    assert without_markdown(MARKDOWN) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4 = 24",
        "2*3*4 = 24",
        "snake_case_name and _start",
        "a - b - c",
        "#hashtag",
        "*",
        "**",
        "f(x)**2 and g(x)**2",
        "-5 degrees",
        "`- *code*`",
        "| a | b |\n| c | d |",
        "I need:\nbread",
    ],
)
def test_what_only_looks_like_markdown_stays(text: str) -> None:
    assert swap_style(text) is None


def test_plain_lists_get_bullets_and_all_else_stays() -> None:
    text = "I need:\nbread\nwater\n\nA line alone.\n\n1. one\n2. two\n\n    code\n    more"
    assert with_bullets(text) == text.replace("bread\nwater", "- bread\n- water")
    assert with_bullets("bread\nwater") == "- bread\n- water"


def test_no_word_is_lost_by_a_swap_of_style() -> None:
    for text in (MARKDOWN, PLAIN, "bread\nwater\n", "**a**", "***a***b"):
        assert words(swap_style(text) or text) == words(text)


def test_bullets_that_were_put_in_come_off_again() -> None:
    assert without_markdown(with_bullets("bread\nwater\n\nend")) == "bread\nwater\n\nend"


# Changes


def test_trailing_changes_touch_the_end_of_every_completion_only() -> None:
    row = pair("a b", "c")
    spaced, ended = CHANGES["trailing_space"](row), CHANGES["trailing_newline"](row)
    assert spaced is not None
    assert ended is not None
    assert spaced.completions == ("a b ", "c ")
    assert ended.completions == ("a b\n", "c\n")
    assert (spaced.prompt, spaced.ranks) == (row.prompt, row.ranks)


def test_an_echo_begins_with_the_last_question() -> None:
    row = pair(" yes", "no")
    echoed = CHANGES["prompt_echo"](row)
    assert echoed is not None
    assert echoed.completions == ("why?\n\nyes", "why?\n\nno")


def test_messages_change_in_the_last_message_only() -> None:
    ask = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "**b**"},
        {"role": "user", "content": "second?"},
    ]
    implicit = parse_row(
        {
            "chosen": [*ask, {"role": "assistant", "content": "**yes**"}],
            "rejected": [*ask, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        }
    )
    assert question_of(implicit) == "second?"
    echoed, plain = CHANGES["prompt_echo"](implicit), CHANGES["style"](implicit)
    assert echoed is not None
    assert plain is not None
    assert echoed.completions[0][:-1] == ask
    assert echoed.completions[0][-1] == {"role": "assistant", "content": "second?\n\n**yes**"}
    assert echoed.completions[1][-1]["content"] == [{"type": "text", "text": "second?\n\nno"}]
    assert plain.completions[0] == [*ask, {"role": "assistant", "content": "yes"}]
    assert plain.completions[1] == implicit.completions[1]
    explicit = pair([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], ask)
    assert question_of(explicit) == "second?"


def test_a_change_that_is_impossible_makes_no_copy() -> None:
    assert CHANGES["style"](pair("plain", "words")) is None
    assert CHANGES["prompt_echo"](parse_row({"chosen": "q a", "rejected": "q b"})) is None
    assert CHANGES["style_rejected"](pair("**a**", "b")) is None


def test_style_on_one_side_leaves_the_other() -> None:
    row = pair("**a**", "**b**")
    both, chosen, rejected = (CHANGES[name](row) for name in ("style", "style_chosen", "style_rejected"))
    assert both is not None
    assert chosen is not None
    assert rejected is not None
    assert both.completions == ("a", "b")
    assert chosen.completions == ("a", "**b**")
    assert rejected.completions == ("**a**", "b")
    ranked = parse_row({"prompt": "q", "completions": ["*a*", "*b*", "*c*"], "ranks": [2, 1, 3]})
    best, others = CHANGES["style_chosen"](ranked), CHANGES["style_rejected"](ranked)
    assert best is not None
    assert others is not None
    assert best.completions == ("*a*", "b", "*c*")
    assert others.completions == ("a", "*b*", "c")


# Measures


def test_a_preference_is_kept_where_its_margin_keeps_its_sign() -> None:
    assert kept_share((0, 1), [1, 0], [9, 8]) == 1
    assert kept_share((0, 1), [0, 1], [0, 2]) == 1  # also a wrong one
    assert kept_share((0, 1), [1, 0], [0, 1]) == 0
    assert kept_share((0, 1), [1, 1], [1, 0]) == 0  # there was none, and now there is
    assert kept_share((0, 1, 1), [3, 2, 1], [3, 1, 4]) == 0.5  # of equal ranks nothing is asked
    assert kept_share((0, 0), [1, 0], [0, 1]) is None


def test_rows_weigh_alike_and_shifts_are_in_units_of_the_spread() -> None:
    found = consistency_of(
        "style",
        [(0, 1), (0, 1, 2), (0, 1)],
        [[2, 0], [3, 2, 1], [1, 0]],
        [[3, 0], [2, 3, 1], [1, 0.5]],
        [[0], [0, 1], [1]],
        2.0,
    )
    assert found.kept == pytest.approx((1 + 2 / 3 + 1) / 3)
    moved = [0.5, -0.5, 0.5, 0.25]
    assert found.shift == pytest.approx(np.mean(moved))
    assert found.shift_std == pytest.approx(np.std(moved))
    assert found.num_rows == 3
    assert found.kept_low < found.kept < found.kept_high


def by_marks(inputs: list[TextInput]) -> list[float]:
    """A model that loves asterisks: ten for each, and one for each letter."""
    return [
        float(10 * str(entry.completion).count("*") + sum(map(str.isalpha, str(entry.completion))))
        for entry in inputs
    ]


def test_a_model_that_scores_by_style_is_told_by_the_style_of_one_side() -> None:
    rows = [pair("**good answer**", "**bad**"), pair("**a b**", "**c**")]
    found = {each.change: each for each in measure_consistency(rows, by_marks)}
    assert list(found) == list(CHANGES)
    assert found["trailing_space"].kept == found["style"].kept == found["style_rejected"].kept == 1
    assert found["style_chosen"].kept == 0
    spread = np.std([40 + 10, 40 + 3, 40 + 2, 40 + 1])
    assert found["style_chosen"].shift == pytest.approx(-40 / spread)
    assert found["style_chosen"].shift_std == pytest.approx(0)
    assert found["trailing_space"].shift == 0
    assert found["prompt_echo"].shift == pytest.approx(3 / spread)


def test_only_rows_that_a_change_is_possible_for_are_counted_and_only_changed_texts_scored() -> None:
    calls: list[int] = []

    def counted(inputs: list[TextInput]) -> list[float]:
        calls.append(len(inputs))
        return by_marks(inputs)

    rows = [pair("**a**", "b"), pair("c", "d"), parse_row({"chosen_ids": [1], "rejected_ids": [2]})]
    found = {each.change: each for each in measure_consistency(rows, counted)}
    assert found["style"].num_rows == 1
    assert found["trailing_space"].num_rows == 2
    assert "style_rejected" not in found
    assert calls == [4, 4, 4, 4, 1, 1]


def test_scores_that_do_not_vary_have_no_unit() -> None:
    (found, *_) = measure_consistency([pair("a", "b")], lambda inputs: [1.0] * len(inputs))
    assert found.kept == 1
    assert math.isnan(found.shift)
    assert found.metrics.keys() == {
        f"consistency_trailing_space_{name}" for name in ("kept", "kept_low", "kept_high", "num_rows")
    }


def test_a_tie_among_all_is_no_preference_to_keep() -> None:
    with pytest.raises(ValueError, match="no comparison"):
        consistency_of("style", [(0, 0)], [[1, 2]], [[1, 2]], [[0]], 1.0)


@pytest.mark.parametrize("conversational", [True, False])
def test_a_saved_model_is_measured(tmp_path: Path, conversational: bool) -> None:
    model = RewardModel.from_pretrained(save_tiny(tmp_path, chat=conversational))
    rows = [
        parse_row(row)
        for row in (
            *tiny_rows(6, conversational=conversational),
            *tiny_rankings(3, conversational=conversational),
        )
    ]
    found = measure_consistency(rows, model.score_inputs)
    assert [each.change for each in found] == ["trailing_space", "trailing_newline", "prompt_echo"]
    assert all(isinstance(each, Consistency) and each.num_rows == 9 for each in found)
    shifts, base = [], []
    for row in rows:
        echoed = CHANGES["prompt_echo"](row)
        assert echoed is not None
        before, after = (
            model.score_inputs([TextInput(one.prompt, text) for text in one.completions])
            for one in (row, echoed)
        )
        base += before
        shifts += [new - old for old, new in zip(before, after, strict=True)]
    assert found[-1].shift == pytest.approx(np.mean(shifts) / np.std(base), abs=1e-3)  # float32 scores
    assert found[-1].shift_std > 0
