"""What a set knows of its rows without reading their ids: lengths, ranks, margins, keys of shared beginnings.

Enough to order a set, to plan its steps, and to turn scores into metrics. R rows have N completions in all,
C comparisons between them, and A attributes by which they are rated. Cost: 68 bytes a row, 20 + 4 A a
completion. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayrm.data.labels import UNRANKED
from rayrm.data.loads import RowCosts, SharedTexts
from rayrm.data.prefix_keys import BOUNDARIES

Counts = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """C comparisons: `row`, `better`, `worse` int64 `[C]`, the last two places among the N completions.

    `weight` float64 `[C]`: a row weighs 1, each of its n comparisons 1/n. `target` float64 `[C]`: the
    probability that better wins. `tie` bool `[C]`: neither is better. `margin` float64 `[C]`: of a tie 0.
    """

    row: Places
    better: Places
    worse: Places
    weight: Floats
    target: Floats
    tie: npt.NDArray[np.bool_]
    margin: Floats

    @property
    def direction(self) -> Floats:
        """1 where better should score higher, -1 where worse should, 0 where neither, `[C]`."""
        return np.where(self.tie, 0.0, np.sign(self.target - 0.5))


@dataclass(frozen=True, slots=True)
class RowIndex:
    """R rows, N completions. The completions of row r stand at `first[r] .. first[r + 1]`.

    `prefix_lengths` (what all completions of the row share), `margins` `[R]`; `prefix_keys` uint32 `[R, 8]`;
    `first` int64 `[R + 1]`; `lengths` (whole), `ranks`, `text_keys` uint64 `[N]`. `distinct_tokens` and
    `distinct_attention` `[R]`: what a row costs alone where its completions share what they begin with.
    `targets` `[R]`: the probability that the better of a comparison wins. `ratings` `[N]`: the score that a
    row says of its completion, or NaN. `attributes` `[N, A]`: its ratings by each attribute, or NaN; A is 0
    where the rows hold none.
    """

    prefix_lengths: Counts
    margins: Floats
    prefix_keys: npt.NDArray[np.uint32]
    first: Places
    lengths: Counts
    ranks: Counts
    distinct_tokens: Counts
    distinct_attention: Places
    text_keys: npt.NDArray[np.uint64]
    targets: Singles
    ratings: Singles
    attributes: Singles

    @classmethod
    def of(
        cls,
        prefix_lengths: npt.ArrayLike,
        margins: npt.ArrayLike,
        prefix_keys: npt.ArrayLike,
        num_completions: npt.ArrayLike,
        lengths: npt.ArrayLike,
        ranks: npt.ArrayLike,
        distinct_tokens: npt.ArrayLike,
        distinct_attention: npt.ArrayLike,
        text_keys: npt.ArrayLike,
        targets: npt.ArrayLike | None = None,
        ratings: npt.ArrayLike | None = None,
        attributes: npt.ArrayLike | None = None,
    ) -> RowIndex:
        """From columns: `num_completions` `[R]`; `lengths`, `ranks`, `text_keys` `[N]`, row after row.

        `targets` None: 1 each; `ratings`, `attributes` None: no completion has one.
        """
        counts = np.asarray(num_completions, np.int64).reshape(-1)
        return cls(
            np.asarray(prefix_lengths, np.int32),
            np.asarray(margins, np.float64),
            np.asarray(prefix_keys, np.uint32).reshape(-1, len(BOUNDARIES)),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.asarray(lengths, np.int32),
            np.asarray(ranks, np.int32),
            np.asarray(distinct_tokens, np.int32),
            np.asarray(distinct_attention, np.int64),
            np.asarray(text_keys, np.uint64),
            np.ones(len(counts), np.float32) if targets is None else np.asarray(targets, np.float32),
            np.full(counts.sum(), np.nan, np.float32) if ratings is None else np.asarray(ratings, np.float32),
            np.zeros((counts.sum(), 0), np.float32)
            if attributes is None
            else np.asarray(attributes, np.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence[RowIndex]) -> RowIndex:
        """The rows of all parts, one part after another."""
        num_attributes = max(part.attributes.shape[1] for part in parts)
        return cls.of(
            np.concatenate([part.prefix_lengths for part in parts]),
            np.concatenate([part.margins for part in parts]),
            np.concatenate([part.prefix_keys for part in parts]),
            np.concatenate([part.num_completions for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.ranks for part in parts]),
            np.concatenate([part.distinct_tokens for part in parts]),
            np.concatenate([part.distinct_attention for part in parts]),
            np.concatenate([part.text_keys for part in parts]),
            np.concatenate([part.targets for part in parts]),
            np.concatenate([part.ratings for part in parts]),
            np.concatenate([_widened(part.attributes, num_attributes) for part in parts]),
        )

    @property
    def num_rows(self) -> int:
        return len(self.prefix_lengths)

    @property
    def num_completions(self) -> Places:
        """K of each row, int64 `[R]`."""
        return np.diff(self.first)

    @property
    def is_ranking(self) -> npt.NDArray[np.bool_]:
        """Whether each row has three or more ranked completions, bool `[R]`."""
        found: npt.NDArray[np.bool_] = self.ranks[self.first[:-1]] != UNRANKED
        return found & (self.num_completions > 2)

    @property
    def row_of(self) -> Places:
        """The row of each completion, int64 `[N]`."""
        return np.repeat(np.arange(self.num_rows), self.num_completions)

    @property
    def alike_together(self) -> Places:
        """The rows in an order in which those that begin alike are neighbours, as far as keys tell, `[R]`.

        In a file they may lie far apart; scored in this order, what they begin with is computed once.
        """
        order: Places = np.lexsort(self.prefix_keys.T[::-1])
        return order

    def places(self, rows: npt.ArrayLike) -> Places:
        """Where the completions of these rows stand, row after row, int64 `[their number]`."""
        wanted = np.asarray(rows, np.int64)
        counts = self.num_completions[wanted]
        begins = np.cumsum(counts) - counts
        return np.repeat(self.first[wanted] - begins, counts) + np.arange(counts.sum())

    def take(self, rows: npt.ArrayLike) -> RowIndex:
        """The index of these rows, in the order asked."""
        wanted = np.asarray(rows, np.int64)
        places = self.places(wanted)
        return RowIndex.of(
            self.prefix_lengths[wanted],
            self.margins[wanted],
            self.prefix_keys[wanted],
            self.num_completions[wanted],
            self.lengths[places],
            self.ranks[places],
            self.distinct_tokens[wanted],
            self.distinct_attention[wanted],
            self.text_keys[places],
            self.targets[wanted],
            self.ratings[places],
            self.attributes[places],
        )

    def tokens(self, *, share: bool, padded: bool = False) -> Places:
        """What each row costs alone, in tokens, int64 `[R]`.

        With `share` what its completions begin with counts once. `padded`: all completions count as much as
        the row's longest.
        """
        if padded:
            return self.num_completions * self._longest()
        return self.distinct_tokens.astype(np.int64) if share else self._sums(self.lengths.astype(np.int64))

    def attention(self, *, share: bool) -> Places:
        """The (query, key) pairs of each row alone, int64 `[R]`, by the same rule as `tokens`."""
        return self.distinct_attention if share else self._sums(_triangle(self.lengths))

    def costs(self, *, share: bool, padded: bool = False) -> RowCosts:
        """What a plan needs to know of the rows; with `share` they share what they begin with, too.

        `padded`: a micro-batch is padded to its longest completion. Then nothing is shared.
        """
        if padded:
            sequences = np.stack([self.num_completions, self._longest()], axis=1)
            return RowCosts(
                self.tokens(share=False, padded=True), self.attention(share=False), None, sequences
            )
        shared = SharedTexts(self.first, self.lengths, self.text_keys, self.prefix_lengths, self.prefix_keys)
        return RowCosts(self.tokens(share=share), self.attention(share=share), shared if share else None)

    def _longest(self) -> Places:
        """The length of each row's longest completion, int64 `[R]`."""
        return np.maximum.reduceat(self.lengths, self.first[:-1]).astype(np.int64)

    def comparisons(self, *, ties: bool = False) -> Comparisons:
        """All comparisons, row after row; those of a row by the places of better, then of worse.

        With `ties` each two completions of equal rank are one too.
        """
        rows, betters, worses = [], [], []
        counts = self.num_completions
        for count in np.unique(counts).tolist():
            (alike,) = np.nonzero(counts == count)
            begins = self.first[alike]
            ranks = self.ranks[begins[:, None] + np.arange(count)]
            above, below = ranks[:, :, None], ranks[:, None, :]
            compared = above < below
            if ties:
                compared |= (above == below) & np.triu(np.ones((count, count), bool), 1)
            row, better, worse = np.nonzero(compared & (above != UNRANKED))
            rows.append(alike[row])
            betters.append(begins[row] + better)
            worses.append(begins[row] + worse)
        row_of = np.concatenate(rows or [np.zeros(0, np.int64)])
        order = np.argsort(row_of, kind="stable")
        row_of, better_of, worse_of = (
            np.concatenate(parts or [row_of])[order] for parts in (rows, betters, worses)
        )
        num_comparisons = np.bincount(row_of, minlength=self.num_rows)
        is_tie = self.ranks[better_of] == self.ranks[worse_of]
        return Comparisons(
            row_of,
            better_of,
            worse_of,
            1.0 / num_comparisons[row_of],
            self.targets[row_of].astype(np.float64),
            is_tie,
            np.where(is_tie, 0.0, self.margins[row_of]),
        )

    def _sums(self, whole: Places) -> Places:
        return np.bincount(self.row_of, weights=whole, minlength=self.num_rows).astype(np.int64)


def _widened(attributes: Singles, count: int) -> Singles:
    """Of rows that hold no attributes: as many, all NaN."""
    return attributes if attributes.shape[1] else np.full((len(attributes), count), np.nan, np.float32)


def _triangle(lengths: Counts) -> Places:
    wide = lengths.astype(np.int64)
    return wide * (wide + 1) // 2
