"""What a set knows of its rows is what the rows themselves say, whatever is joined or taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.blocks import index_of, table_of_rows
from rayrm.data.prefix_keys import prefix_keys, text_key
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow

SEQUENCE = st.lists(st.integers(1, 2), min_size=1, max_size=40).map(lambda ids: np.array(ids, np.int32))
ROW = st.tuples(
    st.lists(st.tuples(SEQUENCE, st.integers(0, 3)), min_size=2, max_size=5).filter(
        lambda row: len({rank for _, rank in row}) > 1
    ),
    st.floats(-1, 1),
).map(lambda row: TokenizedRow.of([ids for ids, _ in row[0]], [rank for _, rank in row[0]], row[1]))
ROWS = st.lists(ROW, max_size=6)


def index_of_rows(rows: list[TokenizedRow]) -> RowIndex:
    return index_of(table_of_rows(rows)).rows


def assert_is_of(index: RowIndex, rows: list[TokenizedRow]) -> None:
    """Every array of the index, from the rows."""
    assert index.num_rows == len(rows)
    assert index.prefix_lengths.tolist() == [row.prefix_length for row in rows]
    assert index.margins.tolist() == [row.margin for row in rows]
    assert index.num_completions.tolist() == [len(row.lengths) for row in rows]
    assert index.lengths.tolist() == [length for row in rows for length in row.lengths]
    assert index.ranks.tolist() == [rank for row in rows for rank in row.ranks]
    keys = [prefix_keys(row.ids, row.prefix_length).tolist() for row in rows]
    assert index.prefix_keys.tolist() == keys
    assert index.text_keys.tolist() == [text_key(ids) for row in rows for ids in row.sequences]


@given(ROWS)
def test_the_index_of_a_table_is_that_of_its_rows(rows: list[TokenizedRow]) -> None:
    assert_is_of(index_of_rows(rows), rows)


@given(ROWS, ROWS, st.data())
def test_rows_are_joined_and_taken_whole(
    some: list[TokenizedRow], more: list[TokenizedRow], data: st.DataObject
) -> None:
    both = RowIndex.joined([index_of_rows(some), index_of_rows(more)])
    assert_is_of(both, some + more)
    if some + more:
        wanted = data.draw(st.lists(st.integers(0, len(some + more) - 1), max_size=8))
        assert_is_of(both.take(wanted), [(some + more)[place] for place in wanted])
        lengths = [length for place in wanted for length in (some + more)[place].lengths]
        assert both.lengths[both.places(wanted)].tolist() == lengths


@given(ROWS)
def test_comparisons_are_those_of_each_row_and_weigh_one_together(rows: list[TokenizedRow]) -> None:
    index = index_of_rows(rows)
    found = index.comparisons()
    expected = [
        (number, index.first[number] + better, index.first[number] + worse)
        for number, row in enumerate(rows)
        for better, worse in row.compared()
    ]
    assert list(zip(found.row.tolist(), found.better.tolist(), found.worse.tolist(), strict=True)) == expected
    each = [1 / len(rows[number].compared()) for number, _, _ in expected]
    assert found.weight.tolist() == pytest.approx(each)


@given(ROWS)
def test_a_row_costs_its_tokens_and_the_keys_that_each_of_them_sees(rows: list[TokenizedRow]) -> None:
    index = index_of_rows(rows)
    for row, whole, shared, pairs, shared_pairs in zip(
        rows,
        index.tokens(share=False).tolist(),
        index.tokens(share=True).tolist(),
        index.attention(share=False).tolist(),
        index.attention(share=True).tolist(),
        strict=True,
    ):
        assert whole == sum(row.lengths)
        beginnings = {tuple(ids[:end]) for ids in row.sequences for end in range(1, len(ids) + 1)}
        assert shared == len(beginnings)
        # A token at position p sees p + 1 keys, itself included.
        assert pairs == sum(position + 1 for length in row.lengths for position in range(length))
        assert shared_pairs == sum(map(len, beginnings))


@given(ROWS)
def test_a_plan_is_told_of_common_beginnings_only_where_they_are_shared(rows: list[TokenizedRow]) -> None:
    index = index_of_rows(rows)
    for share in (True, False):
        costs = index.costs(share=share)
        assert costs.tokens.tolist() == index.tokens(share=share).tolist()
        assert costs.attention.tolist() == index.attention(share=share).tolist()
    told = index.costs(share=True).shared
    assert told is not None
    assert told.prefix_keys is index.prefix_keys
    assert told.text_keys is index.text_keys
    assert told.lengths is index.lengths
    assert index.costs(share=False).shared is None


@given(ROWS)
def test_padded_rows_count_each_completion_as_the_longest(rows: list[TokenizedRow]) -> None:
    costs = index_of_rows(rows).costs(share=False, padded=True)
    assert costs.padded is not None
    assert costs.padded.tolist() == [[len(row.lengths), max(row.lengths)] for row in rows]
    assert costs.tokens.tolist() == [len(row.lengths) * max(row.lengths) for row in rows]
    assert costs.shared is None


def test_rows_that_begin_alike_are_neighbours_wherever_they_lie() -> None:
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(1, 99, 40, dtype=np.int32) for _ in range(5)]
    numbers = rng.permutation(np.repeat(np.arange(5), 8))
    rows = [
        TokenizedRow.pair(*(np.append(beginnings[number], [100 + 2 * place + side]) for side in (0, 1)))
        for place, number in enumerate(numbers.tolist())
    ]
    order = index_of_rows(rows).alike_together
    assert sorted(order.tolist()) == list(range(40))
    changes = np.diff(numbers[order]) != 0
    assert changes.sum() == 4
    # Among those that begin alike the order stays.
    assert all((np.diff(order[numbers[order] == number]) > 0).all() for number in range(5))
