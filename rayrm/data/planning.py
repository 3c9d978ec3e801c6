"""Cut one optimizer step into micro-batches under a token budget, balanced over ranks. Pure numpy.

How it cuts:

1. Rows with a text in common (a completion that stands in several pairs) or a worthwhile beginning, known by
   their keys, form a group that stays together. A group too large for the budget is cut where its beginnings
   branch, else between rows; what a text ties stays together where it fits.
2. Groups and single rows go to ranks costliest first, each to the rank with the least so far. Where groups
   make the ranks uneven they are cut finer, as far as that makes the heaviest rank lighter.
3. Within a rank they fill as few micro-batches as first-fit finds, each the one with which it has most in
   common; then they are spread evenly over as many as the rank with the most has, unless they are padded or
   more would be computed.
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
6. On one rank, a group that fits the budget is in one micro-batch; so the pairs of one prompt's completions
   compute each completion once.
7. A rank's micro-batches differ by no more than the largest row where there is room to spread them. Padded
   rows are not spread: those of like length stand together.
8. The plan is a function of its arguments: costs are integers, and ties go by the step's order.

The cut cannot change the loss: it is a sum over rows, divided once by the step's row count.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from rayrm.data.loads import Load, RowCosts, read_rows
from rayrm.data.prefix_keys import BOUNDARIES
from rayrm.errors import ConfigError

_WORTHWHILE = 8
"""A beginning keeps its rows together when it has at least an eighth of their mean tokens. Shorter ones, such
as a system prompt before long texts, leave rows free to balance; where such rows meet in a micro-batch, and
those of a beginning that all have do so in any plan, it is computed once all the same."""
_TOKENS = attrgetter("tokens")
_EVEN = 1.02
"""Heaviest over mean rank, from which on cutting groups finer cannot gain more than 2%; and how many more
tokens may be computed for micro-batches that are even."""
_FINER = (1, 2, 4, 16, math.inf)
"""How many pieces make up a rank's mean cost, at least, in the cuts that are tried for balance; inf: rows."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Positions of rows within the step's row list, and each row's weight (0 for a dummy)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


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
    singles, groups = _grouped(*read_rows(rows, attention_weight))
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
        [
            Microbatch(tuple(sorted(row.number for row in load.rows)), (1.0,) * len(load.rows))
            for load in loads
        ]
        + [dummy] * (most - len(loads))
        for loads in best
    ]


def _check(rows: RowCosts, max_tokens: int) -> None:
    if not len(rows.tokens):
        raise ValueError("a step needs at least one row")
    assert len(rows.attention) == len(rows.tokens)
    assert rows.shared is None or rows.padded is None
    assert rows.shared is None or rows.shared.prefix_keys.shape == (len(rows.tokens), len(BOUNDARIES))
    longest = int(max(rows.tokens))
    if longest > max_tokens:
        raise ConfigError(
            f"`max_tokens_per_microbatch` ({max_tokens}) is below the longest row ({longest} tokens). "
            f"Raise it to {longest} or lower `max_length`."
        )


def _grouped(loads: list[Load], beginnings: npt.NDArray[np.int64]) -> tuple[list[Load], list[list[Load]]]:
    """The rows that stay alone, and the groups that stay together: of each its rows, as loads."""
    total = np.zeros(len(beginnings), np.int64)
    count = np.zeros(len(beginnings), np.int64)
    for load in loads:
        numbers = [number for number, _ in load.rows[0].beginnings]
        total[numbers] += load.tokens
        count[numbers] += 1
    worthwhile = (_WORTHWHILE * beginnings * count >= total).tolist()

    def ties(load: Load) -> list[int]:
        return [key for key, _ in load.rows[0].beginnings if worthwhile[key]] + load.texts()

    groups = list(_tied(loads, ties))
    return [group[0] for group in groups if len(group) == 1], [group for group in groups if len(group) > 1]


def _tied(loads: Sequence[Load], keys: Callable[[Load], list[int]]) -> Iterator[list[Load]]:
    """The loads in groups that keys tie, by their first; in a group each stands near what it is tied to."""
    having: dict[int, list[int]] = {}
    for number, load in enumerate(loads):
        for key in keys(load):
            having.setdefault(key, []).append(number)
    left = dict(enumerate(loads))
    while left:
        group = [left.pop(next(iter(left)))]
        for load in group:  # which grows meanwhile
            for key in keys(load):
                group += [left.pop(number) for number in having.pop(key, ()) if number in left]
        yield group


def _cut(group: Sequence[Load], max_tokens: int, max_cost: float, depth: int = 0) -> list[Load]:
    """Cut rows that are alike in their first `depth` beginnings into pieces under both limits, or rows."""
    whole = Load.joined(group)
    if len(group) == 1 or (whole.tokens <= max_tokens and whole.cost <= max_cost):
        return [whole]
    branches: dict[int, list[Load]] = {}
    while len(branches) < 2:
        branches = {}
        for load in group:
            # A row that has no more beginnings is a branch of its own.
            further = load.beginnings()[depth : depth + 1]
            branches.setdefault(further[0] if further else -1 - load.first, []).append(load)
        depth += 1
    parts = [part for branch in branches.values() for part in _cut(branch, max_tokens, max_cost, depth)]
    # First what a text ties: filled up with other parts, a piece would have no room for all that it ties.
    whole_ties = [piece for tied in _tied(parts, Load.texts) for piece in _filled(tied, max_tokens, max_cost)]
    return _filled(whole_ties, max_tokens, max_cost)


def _filled(parts: Sequence[Load], max_tokens: int, max_cost: float) -> list[Load]:
    """Consecutive parts joined into pieces under both limits."""
    pieces = [Load.joined(parts[:1])]
    for part in parts[1:]:
        tokens, cost = pieces[-1].with_load(part)
        if tokens > max_tokens or cost > max_cost:
            pieces.append(Load())
        pieces[-1].add(part)
    return pieces


def _microbatches(pieces: Sequence[Load], num_ranks: int, max_tokens: int) -> list[list[Load]]:
    """Each rank's micro-batches, heaviest first."""
    shares: list[list[Load]] = [[] for _ in range(num_ranks)]
    ranks = [Load() for _ in range(num_ranks)]
    least = [(0, 0, rank) for rank in range(num_ranks)]
    for piece in sorted(pieces, key=lambda piece: (-piece.cost, piece.first)):
        _, num_pieces, rank = least[0]
        shares[rank].append(piece)
        ranks[rank].add(piece)
        heapq.heapreplace(least, (ranks[rank].cost, num_pieces + 1, rank))
    for share in shares:
        share.sort(key=lambda piece: (-(piece.longest or piece.tokens), piece.first))
    plans = [_first_fit(share, max_tokens) for share in shares]
    # Padded rows of like length stay together as first-fit put them: spread evenly they would be padded more.
    if not pieces[0].longest:
        most = max(len(loads) for loads in plans)
        plans = [
            _spread(share, most, max_tokens, sum(map(_TOKENS, loads)) * _EVEN) or loads
            for share, loads in zip(shares, plans, strict=True)
        ]
    return [sorted(loads, key=lambda load: (-load.tokens, load.first)) for loads in plans]


def _first_fit(pieces: Sequence[Load], max_tokens: int) -> list[Load]:
    loads: list[Load] = []
    for piece in pieces:
        fits = (load for load in loads if _tokens_with(piece, load) <= max_tokens)
        if piece.known:
            # The one it adds least to; the first of those.
            home = min(fits, key=lambda load: _tokens_with(piece, load) - load.tokens, default=None)
        else:
            home = next(fits, None)
        if home is None:
            home = Load()
            loads.append(home)
        home.add(piece)
    return loads


def _spread(pieces: Sequence[Load], num_loads: int, max_tokens: int, most_tokens: float) -> list[Load]:
    """At most `num_loads` loads as even as may be; none where a piece finds no room, or all are too many."""
    loads = [Load() for _ in range(num_loads)]
    for piece in pieces:
        lightest = min(loads, key=partial(_tokens_with, piece) if piece.known else _TOKENS)
        if _tokens_with(piece, lightest) > max_tokens:
            return []
        lightest.add(piece)
    return [load for load in loads if load.rows] if sum(map(_TOKENS, loads)) <= most_tokens else []


def _tokens_with(piece: Load, load: Load) -> int:
    return load.with_load(piece)[0] if piece.known or piece.longest else load.tokens + piece.tokens


def _heaviest_and_mean(plan: Sequence[Sequence[Load]]) -> tuple[int, float]:
    costs = [sum(load.cost for load in loads) for loads in plan]
    return max(costs), sum(costs) / len(costs)
