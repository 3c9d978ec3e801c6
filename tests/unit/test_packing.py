"""The token forest's invariants, over any sequences: nothing lost, nothing twice, parents first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.packing import (
    Ids,
    PackedBatch,
    ancestors_of,
    attention_runs,
    pack_rows,
    pack_texts,
    pooled_offset,
)
from rayrm.data.tokenize import TokenizedRow

PAD = 0
# Three tokens, one of them the pad: short sequences share beginnings, repeat and contain pads all the time.
SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(lambda ids: np.array(ids, np.int32))
SEQUENCES = st.lists(SEQUENCE, min_size=1, max_size=6)


def segment_at(batch: PackedBatch, token: int) -> int:
    return int(np.searchsorted(batch.start, token, side="right")) - 1


def path_to(batch: PackedBatch, segment: int) -> list[int]:
    return [*ancestors_of(batch.parent, segment), segment]


def tokens_of(batch: PackedBatch, segments: list[int]) -> np.ndarray:
    parts = [np.arange(batch.start[s], batch.start[s] + batch.length[s]) for s in segments]
    return np.concatenate(parts)


def assert_holds(batch: PackedBatch, sequences: list[Ids]) -> None:
    """The four invariants of packing.py's header."""
    paths = [tokens_of(batch, path_to(batch, s)) for s in range(len(batch.parent))]
    walked = {tuple(batch.ids[path]) for path in paths}
    for ids, pooled in zip(sequences, batch.pooled, strict=True):
        # 1. A walk from the root gives the ids; positions count 0, 1, 2, ...
        assert any(walk[: len(ids)] == tuple(ids) and len(walk) == len(ids) for walk in walked)
        # 4. The pooled token is the sequence's rightmost that is not the pad.
        path = paths[segment_at(batch, int(pooled))]
        offset = int(np.flatnonzero(path == pooled)[0])
        assert offset == pooled_offset(ids, PAD)
        assert tuple(batch.ids[path[: offset + 1]]) == tuple(ids[: offset + 1])
    for path in paths:
        np.testing.assert_array_equal(batch.positions[path], np.arange(len(path)))
    # 3. Parents come first; segments tile the tokens.
    assert all(parent < segment for segment, parent in enumerate(batch.parent))
    ends = batch.start + batch.length
    assert (batch.length > 0).all()
    np.testing.assert_array_equal(batch.start, [0, *ends[:-1]])
    assert ends[-1] == batch.num_tokens
    assert batch.num_unshared_tokens == sum(len(ids) for ids in sequences)


def num_prefixes(sequences: list[Ids]) -> int:
    """How many distinct beginnings the sequences have: what must be computed."""
    return len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


@given(SEQUENCES)
def test_texts_keep_their_ids_positions_and_pooled_tokens(sequences: list[Ids]) -> None:
    batch = pack_texts(sequences, PAD)
    assert_holds(batch, sequences)
    # 2. Shared as far as it goes: no two segments of one parent begin alike.
    first = list(zip(batch.parent.tolist(), batch.ids[batch.start].tolist(), strict=True))
    assert len(set(first)) == len(first)
    # So each distinct prefix stands there once.
    assert batch.num_tokens == num_prefixes(sequences)


@given(SEQUENCES)
def test_without_sharing_every_text_is_its_own_root(sequences: list[Ids]) -> None:
    batch = pack_texts(sequences, PAD, share=False)
    assert_holds(batch, sequences)
    assert (batch.parent == -1).all()
    np.testing.assert_array_equal(batch.ids, np.concatenate(sequences))


@given(st.lists(st.tuples(SEQUENCE, SEQUENCE), min_size=1, max_size=5), st.booleans())
def test_pairs_keep_both_sides_in_order(sides: list[tuple[Ids, Ids]], share: bool) -> None:
    pairs = [TokenizedRow.pair(chosen, rejected, margin=i) for i, (chosen, rejected) in enumerate(sides)]
    batch = pack_rows(pairs, PAD, share=share)
    assert_holds(batch, [ids for pair in sides for ids in pair])
    np.testing.assert_array_equal(batch.better, np.arange(0, 2 * len(pairs), 2))
    np.testing.assert_array_equal(batch.worse, np.arange(1, 2 * len(pairs), 2))
    np.testing.assert_array_equal(batch.margin, np.arange(len(pairs)))
    np.testing.assert_array_equal(batch.weight, np.ones(len(pairs)))
    assert batch.num_tokens == (
        num_prefixes([ids for pair in sides for ids in pair]) if share else batch.num_unshared_tokens
    )


ROWS = st.lists(
    st.lists(st.tuples(SEQUENCE, st.integers(0, 2)), min_size=2, max_size=4).filter(
        lambda row: len({rank for _, rank in row}) > 1
    ),
    min_size=1,
    max_size=4,
)


@given(ROWS, st.booleans())
def test_rows_share_every_beginning_and_weigh_what_they_are_given(
    given_rows: list[list[tuple[Ids, int]]], share: bool
) -> None:
    rows = [
        TokenizedRow.of([ids for ids, _ in row], [rank for _, rank in row], margin=number)
        for number, row in enumerate(given_rows)
    ]
    weights = [number % 3 for number in range(len(rows))]
    batch = pack_rows(rows, PAD, share=share, weights=weights)
    sequences = [ids for row in given_rows for ids, _ in row]
    assert_holds(batch, sequences)
    assert batch.num_tokens == (num_prefixes(sequences) if share else batch.num_unshared_tokens)
    # 5. Comparison by comparison, from the ranks.
    ranks = [rank for row in given_rows for _, rank in row]
    row_of = [number for number, row in enumerate(given_rows) for _ in row]
    scores = range(len(sequences))
    told = {(i, j) for i in scores for j in scores if row_of[i] == row_of[j] and ranks[i] < ranks[j]}
    compared = list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True))
    assert set(compared) == told
    assert len(compared) == len(told)
    of_row = np.array([row_of[better] for better, _ in compared])
    np.testing.assert_array_equal(batch.margin, of_row)
    for number, weight in enumerate(weights):
        mine = batch.weight[of_row == number]
        assert len(set(mine.tolist())) == 1
        assert mine.sum() == pytest.approx(weight)


def test_a_completion_of_several_rows_is_computed_once() -> None:
    prompt, best, good, bad = np.array([1, 1, 2]), [2, 2, 1], [1, 2], [0, 1, 1]
    texts = [np.concatenate([prompt, tail]) for tail in (best, good, bad)]
    pairs = [TokenizedRow.pair(texts[i], texts[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    batch = pack_rows(pairs, PAD)
    assert batch.num_tokens == 3 + 3 + 2 + 3
    assert batch.pooled[0] == batch.pooled[2]
    assert batch.pooled[1] == batch.pooled[4]
    assert batch.pooled[3] == batch.pooled[5]
    ranking = pack_rows([TokenizedRow.of(texts, (0, 1, 2))], PAD)
    assert (ranking.num_tokens, len(ranking.pooled), len(ranking.better)) == (batch.num_tokens, 3, 3)


@given(SEQUENCES)
def test_attention_runs_tile_the_segments_in_order(sequences: list[Ids]) -> None:
    batch = pack_texts(sequences, PAD)
    runs = list(attention_runs(batch.parent))
    assert [segment for run in runs for segment in run.segments] == list(range(len(batch.parent)))
    for run in runs:
        for above, below in zip(run.segments, run.segments[1:], strict=False):
            assert batch.parent[below] == above
        for segment in run.segments:
            # What a query sees: the ancestors of the run, and the run up to its own segment.
            seen = [*run.ancestors, *(s for s in run.segments if s <= segment)]
            assert seen == path_to(batch, segment)


def test_a_pair_costs_two_attention_calls() -> None:
    batch = pack_rows([TokenizedRow.pair(np.array([1, 1, 2]), np.array([1, 2, 2, 2]))], PAD)
    assert batch.parent.tolist() == [-1, 0, 0]
    assert [run.segments for run in attention_runs(batch.parent)] == [(0, 1), (2,)]


def test_a_tail_may_be_empty_and_its_score_be_read_in_the_prefix() -> None:
    batch = pack_rows([TokenizedRow.pair(np.array([1, 2]), np.array([1, 2, 1]))], PAD)
    assert batch.length.tolist() == [2, 1]
    assert batch.pooled.tolist() == [1, 2]


def test_a_tail_of_pads_is_pooled_in_the_prefix() -> None:
    batch = pack_rows([TokenizedRow.pair(np.array([1, 2, PAD]), np.array([1, 2, 1]))], PAD)
    assert batch.pooled.tolist() == [1, 3]


def test_a_group_of_duplicates_is_computed_once() -> None:
    same = np.array([1, 2, 1], np.int32)
    batch = pack_texts([same, same, same], PAD)
    assert batch.num_tokens == 3
    assert batch.pooled.tolist() == [2, 2, 2]


def test_a_dummy_keeps_its_weight() -> None:
    batch = pack_rows([TokenizedRow.pair(np.array([1]), np.array([2]))], PAD, weights=(0.0,))
    assert batch.weight.tolist() == [0.0]


@pytest.mark.parametrize(
    ("ids", "pad", "expected"),
    [([1, 2, 3], 0, 2), ([1, 0, 3, 0, 0], 0, 2), ([0, 0], 0, 0), ([1, 0], None, 1)],
)
def test_the_pooled_offset_is_transformers_rule(ids: list[int], pad: int | None, expected: int) -> None:
    assert pooled_offset(np.array(ids, np.int32), pad) == expected
