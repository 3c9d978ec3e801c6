"""Comparisons that have a winner: which they are, and whose scores stand where."""

from __future__ import annotations

import numpy as np
import pytest

from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.metrics.outcomes import joined, outcomes_of


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def rows_of(*rows: TokenizedRow) -> TokenizedSet:
    return TokenizedSet.from_rows(rows)


def test_each_comparison_has_its_winners_score_and_length_and_its_rows_weight() -> None:
    pair = TokenizedRow.of([ids(1, 2, 3), ids(1, 4)], (0, 1))
    ranking = TokenizedRow.of([ids(1, 5), ids(1, 6, 6), ids(1, 7, 7, 7)], (2, 0, 1))
    found = outcomes_of([1.0, 4.0, 10.0, 20.0, 30.0], rows_of(pair, ranking).index)
    assert found.row.tolist() == [0, 1, 1, 1]
    assert found.won.tolist() == [1.0, 20.0, 20.0, 30.0]
    assert found.lost.tolist() == [4.0, 10.0, 30.0, 10.0]
    assert found.margin.tolist() == [-3.0, 10.0, -10.0, 20.0]
    assert found.won_length.tolist() == [3, 3, 3, 4]
    assert found.lost_length.tolist() == [2, 2, 4, 2]
    assert found.weight == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert found.num_rows == 2


def test_the_winner_is_the_likelier_one_and_what_has_none_is_left_out() -> None:
    sides = [ids(1, 2), ids(1, 3)]
    rows = rows_of(
        TokenizedRow.of(sides, (0, 1), target=0.9),
        TokenizedRow.of(sides, (0, 1), target=0.2),
        TokenizedRow.of(sides, (0, 1), target=0.5),
        TokenizedRow.of(sides, (0, 0)),
    )
    found = outcomes_of(np.arange(8.0), rows.index)
    assert found.row.tolist() == [0, 1]
    assert (found.won.tolist(), found.lost.tolist()) == ([0.0, 3.0], [1.0, 2.0])


def test_prompts_and_groups_follow_their_rows() -> None:
    pair = TokenizedRow.of([ids(1, 2), ids(1, 3)], (0, 1))
    found = outcomes_of(
        np.zeros(6), rows_of(pair, pair, pair).index, prompts=[7, 7, 2**63 + 1], groups=["b", "a", "b"]
    )
    assert found.prompt.tolist() == [7, 7, 2**63 + 1]
    assert [found.groups[place] for place in found.group] == ["b", "a", "b"]
    assert found.of_group("b").row.tolist() == [0, 2]
    with pytest.raises(KeyError):
        found.of_group("c")


def test_sets_together_keep_their_rows_apart_and_are_groups() -> None:
    pair = TokenizedRow.of([ids(1, 2), ids(1, 3)], (0, 1))
    one = outcomes_of([1.0, 0.0, 2.0, 0.0], rows_of(pair, pair).index)
    other = outcomes_of([0.0, 3.0], rows_of(pair).index)
    both = joined({"one": one, "other": other})
    assert both.margin.tolist() == [1.0, 2.0, -3.0]
    assert len(set(both.row.tolist())) == both.num_rows == 3
    assert both.of_group("other").margin.tolist() == [-3.0]
