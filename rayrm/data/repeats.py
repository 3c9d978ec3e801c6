"""What rows have in common, by the keys of their texts: repeated rows, contradictions, places of the best.

Pure numpy: what `rayrm data inspect` counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Comparisons, RowIndex

Keys = npt.NDArray[np.uint64]


def best_positions(index: RowIndex, is_ranking: npt.NDArray[np.bool_]) -> dict[int, float]:
    """In which share of the rankings the best stands at each place; of several best each counts a part."""
    row_of = index.row_of
    best = (index.ranks == 0) & is_ranking[row_of]
    if not best.any():
        return {}
    num_best = np.bincount(row_of[best], minlength=index.num_rows)
    places = np.arange(len(row_of)) - index.first[row_of]
    weights = np.bincount(places[best], weights=1 / num_best[row_of[best]])
    return dict(enumerate((weights / is_ranking.sum()).tolist()))


def tokens_prompts_once(index: RowIndex, prompt: Keys) -> int:
    """About what is computed where rows of a prompt meet: what they begin with, and equal texts, once.

    What rows of a prompt share is taken to be as long as the least that texts of one of them share.
    """
    alike = _mixed(prompt) + index.prefix_keys[:, 0]
    _, group = np.unique(alike, return_inverse=True)
    shared = np.full(group.max() + 1, np.iinfo(np.int64).max)
    # What a row of one text shares with others is not known.
    known = np.where(index.num_completions > 1, index.prefix_lengths, 0)
    np.minimum.at(shared, group, known.astype(np.int64))
    num_rows = np.bincount(group)
    again = np.ones(len(index.text_keys), bool)
    again[np.unique(index.text_keys, return_index=True)[1]] = False
    tails = index.lengths - index.prefix_lengths[index.row_of]
    return int(index.tokens(share=True).sum() - ((num_rows - 1) * shared).sum() - tails[again].sum())


def duplicates(index: RowIndex) -> tuple[int, tuple[int, int] | None]:
    """How many rows say the same of the same texts as an earlier one, and the first of them with it."""
    said = index.ranks.astype(np.uint64) + (index.ratings.view(np.uint32).astype(np.uint64) << np.uint64(32))
    parts = _mixed(index.text_keys + _mixed(said + np.uint64(1)))
    for column in index.attributes.T:
        bits = np.ascontiguousarray(column).view(np.uint32).astype(np.uint64)
        parts = _mixed(parts + np.where(np.isnan(column), np.uint64(0), bits + np.uint64(1)))
    same = np.add.reduceat(parts, index.first[:-1]) ^ _mixed(index.targets.view(np.uint32).astype(np.uint64))
    _, first, of_row = np.unique(same, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[of_row] != np.arange(index.num_rows))
    example = (int(again[0]), int(first[of_row[again[0]]])) if len(again) else None
    return len(again), example


def conflicts(index: RowIndex, compared: Comparisons) -> tuple[int, int, tuple[int, int] | None]:
    """How many pairs of texts are preferred both ways, in how many rows, and two rows that disagree.

    What is no more than probable contradicts nothing.
    """
    sure = compared.target == 1
    row_of = compared.row[sure]
    better, worse = index.text_keys[compared.better[sure]], index.text_keys[compared.worse[sure]]
    pairs = _mixed(np.minimum(better, worse)) + np.maximum(better, worse)
    _, pair = np.unique(pairs, return_inverse=True)
    upward = better < worse
    num_up = np.bincount(pair, weights=upward)
    is_conflict = (num_up > 0) & (num_up < np.bincount(pair))
    places = np.flatnonzero(is_conflict[pair])
    if not len(places):
        return 0, 0, None
    other = places[(pair[places] == pair[places[0]]) & (upward[places] != upward[places[0]])][0]
    rows = row_of[places]
    example = (int(row_of[places[0]]), int(row_of[other]))
    return int(is_conflict.sum()), len(np.unique(rows)), example


def _mixed(keys: Keys) -> Keys:
    """Spread bits, so that sums of keys tell sets of them apart (splitmix64, S. Vigna)."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
