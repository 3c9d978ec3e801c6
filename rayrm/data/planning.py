"""Cut one optimizer step into micro-batches under a token budget, balanced over ranks. Pure numpy.

How it cuts:

1. Rows that share a worthwhile beginning, known by their prefix keys, form a group that stays together. A
   group too large for the budget is cut where its beginnings branch, else between rows.
2. Groups and single rows go to ranks costliest first, each to the rank with the least so far. Where groups
   make the ranks uneven they are cut finer, as far as that makes the heaviest rank lighter.
3. Within a rank they fill as few micro-batches as first-fit finds, then are spread evenly over as many as the
   rank with the most has, unless they are padded.
4. Ranks get equally many micro-batches, heaviest first, filled up with dummies: their rows have weight 0.
   ZeRO's collectives need every rank to run the same number of forwards and backwards, and ranks that run in
   step wait least when the micro-batches of one place are alike.

Invariants, each a test:

1. Every row of the step is in exactly one micro-batch with weight 1; a dummy is a micro-batch of its own.
2. No micro-batch exceeds the budget in distinct tokens: shared is only what equal keys show to be. Where rows
   are padded it does not exceed it with its padding.
3. All ranks have equally many micro-batches, at least one; only one where every rank's rows fit the budget.
4. Without sharing, no two ranks differ by more than the costliest row.
5. With sharing, where each rank has one micro-batch, the heaviest rank is no heavier than the mean without
   sharing and one row.
6. On one rank, a group that fits the budget is in one micro-batch.
7. A rank's micro-batches differ by no more than the largest row where there is room to spread them. Padded
   rows are not spread: those of like length stand together.
8. The plan is a function of its arguments: costs are integers, and ties go by the step's order.

The cut cannot change the loss: it is a sum over rows, divided once by the step's row count.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from rayrm.data.prefix_keys import BOUNDARIES
from rayrm.errors import ConfigError

_WORTHWHILE = 4
"""A beginning keeps its rows together when it has at least a quarter of their mean tokens. Shorter ones, such
as a system prompt before long texts, leave rows free to balance; where such rows meet in a micro-batch, and
those of a beginning that all have do so in any plan, it is computed once all the same."""
_TOKENS = attrgetter("tokens")
_EVEN = 1.02
"""Heaviest over mean rank, from which on cutting groups finer cannot gain more than 2%."""
_FINER = (1, 2, 4, 16, math.inf)
"""How many pieces make up a rank's mean cost, at least, in the cuts that are tried for balance; inf: rows."""


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What the rows of a step cost, each `[n]`: `tokens` computed when a row stands alone (at least 1), and
    `attention`, its (query, key) pairs.

    `prefix_keys` uint32 `[n, 8]` (see `prefix_keys.py`); None where rows share nothing. `padded` int64
    `[n, 2]`, each row's number of sequences and the length of its longest, where a micro-batch is padded to
    its longest sequence (to a multiple beyond that is not counted); None where nothing is padded.
    """

    tokens: npt.NDArray[np.integer]
    attention: npt.NDArray[np.integer]
    prefix_keys: npt.NDArray[np.uint32] | None = None
    padded: npt.NDArray[np.integer] | None = None


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Positions of rows within the step's row list, and each row's weight (0 for a dummy)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(slots=True)
class _Load:
    """Rows computed together; `beginnings` they share with others -> (tokens, cost), each counted once.

    Where rows are padded they have `num_sequences`, all of them as long as the `longest`.
    """

    rows: list[int] = field(default_factory=list)
    tokens: int = 0
    cost: int = 0
    beginnings: dict[int, tuple[int, int]] = field(default_factory=dict)
    num_sequences: int = 0
    longest: int = 0

    def with_load(self, other: _Load) -> tuple[int, int]:
        """(tokens, cost) if `other` were added."""
        tokens, cost = self.tokens + other.tokens, self.cost + other.cost
        if other.longest:
            tokens = (self.num_sequences + other.num_sequences) * max(self.longest, other.longest)
        for beginning, (known_tokens, known_cost) in other.beginnings.items():
            if beginning in self.beginnings:
                tokens -= known_tokens
                cost -= known_cost
        return tokens, cost

    def add(self, other: _Load) -> None:
        self.tokens, self.cost = self.with_load(other)
        self.num_sequences += other.num_sequences
        self.longest = max(self.longest, other.longest)
        self.rows.extend(other.rows)
        self.beginnings.update(other.beginnings)


def attention_weight(attention_width: int, num_layers: int, num_parameters: int) -> float:
    """What one (query, key) pair costs, in tokens: 2 x width x layers / non-embedding parameters.

    A pair takes 4 x width x layers operations (its dot product and its part of the weighted sum, each a
    multiplication and an addition in every layer), a token's linear layers 2 x parameters; backward takes
    twice that of both. The width is heads x head size, the hidden size in most models.
    """
    return 2 * attention_width * num_layers / num_parameters


def plan_step(
    rows: RowCosts, *, num_ranks: int, max_tokens: int, attention_weight: float = 0.0
) -> list[list[Microbatch]]:
    """Plan a step: one list of micro-batches per rank, none above `max_tokens`.

    Balanced by tokens + attention x `attention_weight` (the cost of a (query, key) pair in tokens, see the
    function of that name; 0 balances tokens alone).
    """
    _check(rows, max_tokens)
    singles, groups = _read(rows, attention_weight)
    whole = singles + [piece for group in groups for piece in _cut(group, max_tokens, math.inf)]
    best = _microbatches(whole, num_ranks, max_tokens)
    lightest, mean = _heaviest_and_mean(best)
    largest = max(piece.cost for piece in whole)
    for limit in (mean / parts for parts in _FINER):
        if lightest <= _EVEN * mean:
            break
        if limit >= largest or not groups:
            continue
        pieces = singles + [piece for group in groups for piece in _cut(group, max_tokens, limit)]
        plan = _microbatches(pieces, num_ranks, max_tokens)
        heaviest, _ = _heaviest_and_mean(plan)
        if heaviest < lightest:
            best, lightest = plan, heaviest
    most = max(1, *(len(loads) for loads in best))
    # Rows keep the step's order within a micro-batch: float sums then depend on the plan alone.
    dummy = Microbatch((int(np.argmin(rows.tokens)),), (0.0,))
    return [
        [Microbatch(tuple(sorted(load.rows)), (1.0,) * len(load.rows)) for load in loads]
        + [dummy] * (most - len(loads))
        for loads in best
    ]


def _check(rows: RowCosts, max_tokens: int) -> None:
    if not len(rows.tokens):
        raise ValueError("a step needs at least one row")
    assert len(rows.attention) == len(rows.tokens)
    assert rows.prefix_keys is None or rows.padded is None
    assert rows.prefix_keys is None or rows.prefix_keys.shape == (len(rows.tokens), len(BOUNDARIES))
    longest = int(max(rows.tokens))
    if longest > max_tokens:
        raise ConfigError(
            f"`max_tokens_per_microbatch` ({max_tokens}) is below the longest row ({longest} tokens). "
            f"Raise it to {longest} or lower `max_length`."
        )


def _read(rows: RowCosts, attention_weight: float) -> tuple[list[_Load], list[list[_Load]]]:
    """Each row as a load: those that stay alone, and the groups that share a worthwhile beginning."""
    # Rounded to integers: their sums do not depend on an order of adding.
    costs = rows.tokens + np.rint(np.asarray(rows.attention) * attention_weight).astype(np.int64)
    loads = [
        _Load([row], tokens, cost)
        for row, (tokens, cost) in enumerate(zip(rows.tokens.tolist(), costs.tolist(), strict=True))
    ]
    if rows.padded is not None:
        for load, (num_sequences, longest) in zip(loads, rows.padded.tolist(), strict=True):
            load.num_sequences, load.longest = num_sequences, longest
    if rows.prefix_keys is None:
        return loads, []
    groups: dict[int, list[_Load]] = {}
    numbers = _note_beginnings(loads, rows.tokens, rows.prefix_keys, attention_weight)
    for load, number in zip(loads, numbers, strict=True):
        groups.setdefault(number, []).append(load)
    return groups.pop(-1, []), list(groups.values())


def _note_beginnings(
    loads: Sequence[_Load],
    tokens: npt.NDArray[np.integer],
    keys: npt.NDArray[np.uint32],
    attention_weight: float,
) -> list[int]:
    """Write to each row the beginnings it shares, shortest first; give each row's group, -1 for none."""
    group = np.full(len(loads), -1, np.int64)
    beginning = np.zeros(len(loads), np.uint64)
    members = np.arange(len(loads))
    above = (0, 0)
    num_beginnings = 0
    for level, boundary in enumerate(BOUNDARIES):
        members = members[keys[members, level] != 0]
        # Rows begin alike up to here where they did up to the boundary before and have the same key now.
        alike = (beginning[members] << np.uint64(32)) | keys[members, level]
        _, place, count = np.unique(alike, return_inverse=True, return_counts=True)
        total = np.bincount(place, weights=tokens[members], minlength=len(count))
        worthwhile = _WORTHWHILE * boundary * count >= total
        shared = count[place] > 1
        members, place = members[shared], place[shared]
        number = num_beginnings + place
        num_beginnings += len(count)
        beginning[members] = number
        joins = (group[members] < 0) & worthwhile[place]
        group[members[joins]] = number[joins]
        # Only what lies between this boundary and the one before: the rest belongs to the shorter beginning.
        whole = (boundary, boundary + round(boundary * (boundary + 1) // 2 * attention_weight))
        own = (whole[0] - above[0], whole[1] - above[1])
        above = whole
        for row, found in zip(members.tolist(), number.tolist(), strict=True):
            loads[row].beginnings[found] = own
    groups: list[int] = group.tolist()
    return groups


def _joined(loads: Iterable[_Load]) -> _Load:
    whole = _Load()
    for load in loads:
        whole.add(load)
    return whole


def _cut(group: Sequence[_Load], max_tokens: int, max_cost: float, depth: int = 0) -> list[_Load]:
    """Cut rows that are alike in their first `depth` beginnings into pieces under both limits, or rows."""
    whole = _joined(group)
    if len(group) == 1 or (whole.tokens <= max_tokens and whole.cost <= max_cost):
        return [whole]
    branches: dict[int, list[_Load]] = {}
    while len(branches) < 2:
        branches = {}
        for load in group:
            # Beginnings stand in a row's dict shortest first. A row that has no more is a branch of its own.
            further = list(load.beginnings)[depth : depth + 1]
            branches.setdefault(further[0] if further else -1 - load.rows[0], []).append(load)
        depth += 1
    parts = [part for branch in branches.values() for part in _cut(branch, max_tokens, max_cost, depth)]
    pieces = [_joined(parts[:1])]
    for part in parts[1:]:
        tokens, cost = pieces[-1].with_load(part)
        if tokens > max_tokens or cost > max_cost:
            pieces.append(_Load())
        pieces[-1].add(part)
    return pieces


def _microbatches(pieces: Sequence[_Load], num_ranks: int, max_tokens: int) -> list[list[_Load]]:
    """Each rank's micro-batches, heaviest first."""
    shares: list[list[_Load]] = [[] for _ in range(num_ranks)]
    ranks = [_Load() for _ in range(num_ranks)]
    least = [(0, 0, rank) for rank in range(num_ranks)]
    for piece in sorted(pieces, key=lambda piece: (-piece.cost, piece.rows[0])):
        _, num_pieces, rank = least[0]
        shares[rank].append(piece)
        ranks[rank].add(piece)
        heapq.heapreplace(least, (ranks[rank].cost, num_pieces + 1, rank))
    for share in shares:
        share.sort(key=lambda piece: (-(piece.longest or piece.tokens), piece.rows[0]))
    first_fits = [_first_fit(share, max_tokens) for share in shares]
    plans = first_fits
    # Padded rows of like length stay together as first-fit put them: spread evenly they would be padded more.
    if not pieces[0].longest:
        most = max(len(loads) for loads in first_fits)
        plans = [
            _spread(share, most, max_tokens) or loads for share, loads in zip(shares, first_fits, strict=True)
        ]
    return [sorted(loads, key=lambda load: (-load.tokens, load.rows[0])) for loads in plans]


def _first_fit(pieces: Sequence[_Load], max_tokens: int) -> list[_Load]:
    loads: list[_Load] = []
    for piece in pieces:
        fits = next((load for load in loads if _tokens_with(piece, load) <= max_tokens), None)
        if fits is None:
            fits = _Load()
            loads.append(fits)
        fits.add(piece)
    return loads


def _spread(pieces: Sequence[_Load], num_loads: int, max_tokens: int) -> list[_Load]:
    """At most `num_loads` loads as even as may be; none where a piece finds no room."""
    loads = [_Load() for _ in range(num_loads)]
    for piece in pieces:
        lightest = min(loads, key=_TOKENS if not piece.beginnings else partial(_tokens_with, piece))
        if _tokens_with(piece, lightest) > max_tokens:
            return []
        lightest.add(piece)
    return [load for load in loads if load.rows]


def _tokens_with(piece: _Load, load: _Load) -> int:
    return load.with_load(piece)[0] if piece.beginnings or piece.longest else load.tokens + piece.tokens


def _heaviest_and_mean(plan: Sequence[Sequence[_Load]]) -> tuple[int, float]:
    costs = [sum(load.cost for load in loads) for loads in plan]
    return max(costs), sum(costs) / len(costs)
