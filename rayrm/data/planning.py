"""Cut one optimizer step into micro-batches under a token budget, balanced over ranks. Pure.

How it cuts:

1. The cost of a row is its tokens; rows go to ranks longest first, each to the rank with the least so far.
2. Within a rank, rows fill micro-batches longest first, each into the first that has room.
3. Ranks get equally many micro-batches, filled up with dummies: their rows have weight 0. ZeRO's collectives
   need every rank to run the same number of forwards and backwards.

Invariants, each a test: every row of the step is in exactly one micro-batch with weight 1; no micro-batch
exceeds the budget; all ranks have equally many micro-batches, at least one; the plan is a function of its
arguments. The cut cannot change the loss: it is a sum over rows, divided once by the step's row count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayrm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Positions of rows within the step's row list, and each row's weight (0 for a dummy)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


def plan_step(
    tokens: Sequence[int] | npt.NDArray[np.integer], *, num_ranks: int, max_tokens: int
) -> list[list[Microbatch]]:
    """Plan a step of `len(tokens)` rows, row i costing `tokens[i]`: one list of micro-batches per rank."""
    costs = [int(cost) for cost in tokens]
    if not costs:
        raise ValueError("a step needs at least one row")
    longest = max(costs)
    if longest > max_tokens:
        raise ConfigError(
            f"`max_tokens_per_microbatch` ({max_tokens}) is below the longest pair ({longest} tokens). "
            f"Raise it to {longest} or lower `max_length`."
        )
    longest_first = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in longest_first:
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(shares[r]), r))
        loads[rank] += costs[row]
        shares[rank].append(row)
    plans = [_fill(share, costs, max_tokens) for share in shares]
    cheapest = longest_first[-1]
    most = max(len(plan) for plan in plans)
    for plan in plans:
        plan.extend(Microbatch((cheapest,), (0.0,)) for _ in range(most - len(plan)))
    return plans


def _fill(rows: list[int], costs: list[int], max_tokens: int) -> list[Microbatch]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        fits = next((b for b, free in enumerate(room) if free >= costs[row]), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[fits].append(row)
        room[fits] -= costs[row]
    # Rows keep the step's order within a micro-batch: float sums then depend on the plan alone.
    return [Microbatch(tuple(sorted(b)), (1.0,) * len(b)) for b in bins]
