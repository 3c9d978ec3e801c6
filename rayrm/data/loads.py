"""What rows cost, alone and beside others: the arithmetic of a plan. Pure numpy.

A row's own tokens are known exactly. Of what it has in common with other rows a plan knows what equal keys
show (`prefix_keys.py`): a beginning of all its texts, and each text as a whole, so that a completion which
stands in several pairs is counted once. Keys show no more than there is, so that a `Load` never counts less
than the distinct tokens of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rayrm.data.prefix_keys import BOUNDARIES

Integers = npt.NDArray[np.integer]
Cost = tuple[int, int]
"""Tokens, and tokens with attention counted in."""


@dataclass(frozen=True, slots=True)
class SharedTexts:
    """What n rows may have in common. Row i's texts stand at `first[i] .. first[i + 1]` of all N.

    `lengths` and `text_keys` uint64 `[N]`; `prefix_lengths` (what all texts of a row share) `[n]` and
    `prefix_keys` uint32 `[n, 8]` of it (see `prefix_keys.py`).
    """

    first: Integers
    lengths: Integers
    text_keys: npt.NDArray[np.uint64]
    prefix_lengths: Integers
    prefix_keys: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What the rows of a step cost, each `[n]`: `tokens` computed when a row stands alone (at least 1), and
    `attention`, its (query, key) pairs.

    `shared` is None where rows share nothing. `padded` int64 `[n, 2]`, each row's number of sequences and the
    length of its longest, where a micro-batch is padded to its longest sequence (to a multiple beyond that is
    not counted); None where nothing is padded.
    """

    tokens: Integers
    attention: Integers
    shared: SharedTexts | None = None
    padded: Integers | None = None


@dataclass(slots=True)
class Row:
    """One row. Numbers stand for keys that more than one row has.

    `beginnings`: (number, what the beginning costs), shortest first. `texts`: (number or -1, what the text
    costs beyond what all texts of the row share, what it costs as a whole).
    """

    number: int
    alone: Cost
    beginnings: list[tuple[int, Cost]] = field(default_factory=list)
    texts: list[tuple[int, Cost, Cost]] = field(default_factory=list)

    def beside(self, known: set[int]) -> Cost:
        """What the row adds to rows whose keys are `known`, at most."""
        missing = [tail for number, tail, _ in self.texts if number not in known]
        if len(missing) < len(self.texts):
            # One text that is there brings what all share; the others add their tails, or what they have in
            # common with each other, which `alone` knows.
            there = [whole for number, _, whole in self.texts if number in known]
            tokens = min(sum(tail[0] for tail in missing), self.alone[0] - max(whole[0] for whole in there))
            cost = min(sum(tail[1] for tail in missing), self.alone[1] - max(whole[1] for whole in there))
            return tokens, cost
        for number, (tokens, cost) in reversed(self.beginnings):
            if number in known:
                return self.alone[0] - tokens, self.alone[1] - cost
        return self.alone


@dataclass(slots=True)
class Load:
    """Rows computed together; what several of them share is counted once.

    Where rows are padded they have `num_sequences`, all of them as long as the `longest`.
    """

    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    cost: int = 0
    known: set[int] = field(default_factory=set)
    num_sequences: int = 0
    longest: int = 0

    @classmethod
    def of(cls, row: Row, num_sequences: int = 0, longest: int = 0) -> Load:
        """A row alone."""
        known = {number for number, _ in row.beginnings}
        known.update(number for number, _, _ in row.texts if number >= 0)
        return cls([row], *row.alone, known, num_sequences, longest)

    @classmethod
    def joined(cls, loads: Iterable[Load]) -> Load:
        whole = cls()
        for load in loads:
            whole.add(load)
        return whole

    @property
    def first(self) -> int:
        """The number of the first row."""
        return self.rows[0].number

    def texts(self) -> list[int]:
        """The numbers of the texts that stand elsewhere too."""
        return list(dict.fromkeys(number for row in self.rows for number, _, _ in row.texts if number >= 0))

    def beginnings(self) -> list[int]:
        """The numbers of what all rows begin with, shortest first."""
        paths = [[number for number, _ in row.beginnings] for row in self.rows]
        return [numbers[0] for numbers in zip(*paths, strict=False) if len(set(numbers)) == 1]

    def with_load(self, other: Load) -> Cost:
        """(tokens, cost) if `other` were added."""
        if other.longest:
            tokens = (self.num_sequences + other.num_sequences) * max(self.longest, other.longest)
            return tokens, self.cost + other.cost
        if self.known.isdisjoint(other.known):
            return self.tokens + other.tokens, self.cost + other.cost
        if len(other.rows) == 1:
            tokens, cost = other.rows[0].beside(self.known)
            return self.tokens + tokens, self.cost + cost
        both = Load(tokens=self.tokens, cost=self.cost, known=set(self.known))
        for row in other.rows:
            both.add(Load.of(row))
        return both.tokens, both.cost

    def add(self, other: Load) -> None:
        self.tokens, self.cost = self.with_load(other)
        self.num_sequences += other.num_sequences
        self.longest = max(self.longest, other.longest)
        self.rows.extend(other.rows)
        self.known |= other.known


def read_rows(rows: RowCosts, attention_weight: float) -> tuple[list[Load], npt.NDArray[np.int64]]:
    """Each row as a load, and how many tokens each beginning has, by its number.

    A cost is tokens + attention x `attention_weight`, rounded: sums of integers do not depend on their order.
    """
    costs = rows.tokens + np.rint(np.asarray(rows.attention) * attention_weight).astype(np.int64)
    found = [
        Row(number, alone)
        for number, alone in enumerate(zip(rows.tokens.tolist(), costs.tolist(), strict=True))
    ]
    if rows.padded is not None:
        padded = rows.padded.tolist()
        return [Load.of(row, *sizes) for row, sizes in zip(found, padded, strict=True)], np.zeros(0, np.int64)
    if rows.shared is None:
        return [Load.of(row) for row in found], np.zeros(0, np.int64)
    beginnings = _note_beginnings(found, rows.shared.prefix_keys, attention_weight)
    _note_texts(found, rows.shared, attention_weight, len(beginnings))
    return [Load.of(row) for row in found], beginnings


def _cost(length: int, attention_weight: float) -> Cost:
    """Of one causal sequence."""
    return length, length + round(length * (length + 1) // 2 * attention_weight)


def _note_beginnings(
    rows: Sequence[Row], keys: npt.NDArray[np.uint32], attention_weight: float
) -> npt.NDArray[np.int64]:
    """Write to each row the beginnings that other rows have too; the length of each, by its number."""
    beginning = np.zeros(len(rows), np.uint64)
    members = np.arange(len(rows))
    lengths: list[int] = []
    for level, boundary in enumerate(BOUNDARIES):
        members = members[keys[members, level] != 0]
        # Rows begin alike up to here where they did up to the boundary before and have the same key now.
        alike = (beginning[members] << np.uint64(32)) | keys[members, level]
        _, place, count = np.unique(alike, return_inverse=True, return_counts=True)
        shared = count[place] > 1
        members, numbers = members[shared], len(lengths) + place[shared]
        lengths.extend([boundary] * len(count))
        beginning[members] = numbers
        cost = _cost(boundary, attention_weight)
        for row, number in zip(members.tolist(), numbers.tolist(), strict=True):
            rows[row].beginnings.append((number, cost))
    return np.array(lengths, np.int64)


def _note_texts(rows: Sequence[Row], shared: SharedTexts, attention_weight: float, first_number: int) -> None:
    """Write to each row with a text that stands elsewhere too what its texts cost."""
    _, place, count = np.unique(shared.text_keys, return_inverse=True, return_counts=True)
    numbers = np.where(count[place] > 1, first_number + place, -1)
    lengths, first = shared.lengths.tolist(), shared.first.tolist()
    for row, begin, end in zip(rows, first[:-1], first[1:], strict=True):
        if (numbers[begin:end] < 0).all():
            continue
        prefix = _cost(int(shared.prefix_lengths[row.number]), attention_weight)
        for number, length in zip(numbers[begin:end].tolist(), lengths[begin:end], strict=True):
            whole = _cost(length, attention_weight)
            row.texts.append((number, (whole[0] - prefix[0], whole[1] - prefix[1]), whole))
