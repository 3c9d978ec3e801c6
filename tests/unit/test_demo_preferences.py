"""The demo's preferences: their laws for several seeds, and the baselines on planted preferences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayrm.data.preference import form_of, parse_row
from rayrm.demo.baselines import bag_of_words_accuracy, length_accuracy
from rayrm.demo.preferences import KINDS, answer_text, make_preferences, write_preferences
from rayrm.errors import ConfigError

SEEDS = range(7)  # one more than there are ways to hold out every sixth template


def _row(good: str, bad: str, kind: str = "planted") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
        "kind": kind,
        "template": "planted-00",
    }


def test_there_are_at_least_eight_kinds_of_at_least_twelve_distinct_templates() -> None:
    assert len(KINDS) >= 8
    for kind in KINDS:
        assert len(kind.templates) >= 12
        assert len({template.ask for template in kind.templates}) == len(kind.templates)


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_are_as_asked_and_kinds_are_equally_many(seed: int) -> None:
    train, heldout = make_preferences(2400, seed)
    assert len(train) + len(heldout) == 2400
    assert len(train) >= 2000
    assert len(heldout) >= 300
    for rows in (train, heldout):
        counts = Counter(row["kind"] for row in rows)
        assert set(counts) == {kind.name for kind in KINDS}
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_no_prompt_is_there_twice_and_no_template_in_both_splits(seed: int) -> None:
    train, heldout = make_preferences(2400, seed)
    prompts = [answer_text(row["prompt"]) for row in train + heldout]
    assert len(set(prompts)) == len(prompts)
    templates = {row["template"] for row in train}, {row["template"] for row in heldout}
    assert not templates[0] & templates[1]
    assert len(templates[0] | templates[1]) == sum(len(kind.templates) for kind in KINDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_preferring_the_longer_answer_is_right_half_the_time_in_each_split_and_kind(seed: int) -> None:
    for rows in make_preferences(2400, seed):
        assert abs(length_accuracy(rows) - 0.5) <= 0.03
        for kind in KINDS:
            of_kind = [row for row in rows if row["kind"] == kind.name]
            # The difference is at most one pair of the kind's (33 in the held-out split).
            assert abs(length_accuracy(of_kind) - 0.5) <= 1 / len(of_kind)


def test_a_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert make_preferences(600, 3) == make_preferences(600, 3)
    assert make_preferences(600, 3) != make_preferences(600, 4)


def test_every_row_is_a_conversational_pair_of_two_different_answers() -> None:
    for rows in make_preferences():
        for row in rows:
            assert form_of(parse_row(row)) == "conversational"
            better, worse = answer_text(row["chosen"]), answer_text(row["rejected"])
            assert better.strip()
            assert worse.strip()
            assert better != worse


def test_no_slot_is_left_unfilled_and_no_marker_is_left_over() -> None:
    for rows in make_preferences():
        for row in rows:
            for side in ("prompt", "chosen", "rejected"):
                text = answer_text(row[side])
                assert not set("{}~") & set(text), text


def test_more_pairs_than_the_templates_can_give_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"num_pairs .* Ask for fewer pairs"):
        make_preferences(200_000)


def test_written_files_hold_the_rows(tmp_path: Path) -> None:
    import json

    train, heldout = make_preferences(240, 1)
    for path, rows in zip(write_preferences(tmp_path / "new", 240, 1), (train, heldout), strict=True):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows


def test_the_length_baseline_counts_longer_as_right_and_equal_as_half() -> None:
    assert length_accuracy([_row("long", "s"), _row("longer", "s")]) == 1.0
    assert length_accuracy([_row("s", "long")]) == 0.0
    assert length_accuracy([_row("ab", "cd"), _row("abc", "d")]) == 0.75


def test_the_bag_of_words_finds_a_planted_word_and_nothing_where_words_agree() -> None:
    pytest.importorskip("sklearn")
    words = ["tree", "house", "river", "stone", "bread", "water"]
    planted = [_row(f"thanks {word}", f"never {word}") for word in words]
    shuffled = [_row(f"{word} one two", f"two one {word}", "order") for word in words]
    accuracy, by_kind = bag_of_words_accuracy(planted, planted + shuffled)
    assert by_kind == {"planted": 1.0, "order": 0.5}
    assert accuracy == 0.75


def test_the_bag_of_words_cannot_read_most_of_the_preferences() -> None:
    pytest.importorskip("sklearn")
    accuracy, by_kind = bag_of_words_accuracy(*make_preferences())
    # Clearly below what the demo's model must reach (0.85); word order cannot be seen at all.
    assert accuracy < 0.75
    assert by_kind["order"] == 0.5
