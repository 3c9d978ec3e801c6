"""A step of the run -> this rank's share: planned over all ranks, fetched, packed, a few steps ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rayrm.data.packing import PackedBatch, pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.steps import Step
from rayrm.data.tokenize import TokenizedRow
from rayrm.objective import Objective
from rayrm.train.loop import RankStep

_STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Packer:
    """How a rank packs its share of a step. `name_of`: what the row log calls a row. `objective`: for which
    loss. `parts`: how many ranks have one share together, each a part of its tokens; `rank` of `num_ranks` is
    then the group's number among groups, and `max_tokens` still what one rank computes."""

    layout: str
    rank: int
    num_ranks: int
    max_tokens: int
    attention_weight: float
    pad_token_id: int
    name_of: Callable[[TokenizedRow], str]
    objective: Objective | None = None
    parts: int = 1

    def rank_step(self, step: Step) -> RankStep:
        """Plan the step over all ranks, fetch and pack this rank's share."""
        index = step.index
        shares, padded = self.layout == "shared", self.layout == "padded"
        costs = index.costs(share=shares, padded=padded)
        plan = plan_step(
            costs,
            num_ranks=self.num_ranks,
            # A stream may hold longer rows than its beginning, such as rankings.
            max_tokens=max(self.max_tokens * self.parts, int(costs.tokens.max())),
            attention_weight=self.attention_weight,
        )
        mine = plan[self.rank]
        fetched = [step.fetch(microbatch.rows) for microbatch in mine]

        def pack(rows: list[TokenizedRow], weights: Sequence[float] | None = None) -> PackedBatch:
            return pack_rows(rows, self.pad_token_id, share=shares, weights=weights, objective=self.objective)

        def names(rows: list[TokenizedRow], weights: Sequence[float]) -> list[str]:
            weighed = zip(rows, weights, strict=True)
            return [self.name_of(row) if weight else "" for row, weight in weighed]

        parts = [(rows, microbatch.weights) for rows, microbatch in zip(fetched, mine, strict=True)]
        return RankStep(
            [pack(*part) for part in parts],
            index.num_rows,
            int(index.lengths.sum()),
            step.after,
            row_names=[names(*part) for part in parts],
            pack_alone=lambda place, row: pack([fetched[place][row]]),
            padded=padded,
            epoch=step.epoch,
            parts=self.parts,
        )

    def ahead(self, steps: Iterator[Step]) -> Generator[RankStep]:
        """The shares of `steps`, prepared by one thread a few steps before they are asked for."""
        shares = map(self.rank_step, steps)
        with ThreadPoolExecutor(1, thread_name_prefix="rayrm-prepare") as thread:
            pending = [thread.submit(next, shares) for _ in range(_STEPS_AHEAD)]
            try:
                while True:
                    ready = pending.pop(0).result()
                    pending.append(thread.submit(next, shares))
                    yield ready
            finally:
                for future in pending:
                    future.cancel()
