"""The token budget of a micro-batch, where none is given: as many tokens as memory has room for, measured.

Each rank measures what a token takes on the run's longest row (`footprint.py`). The budget is the largest
power of two that a share of the free memory holds beside gradients and optimizer state, coarse so that the
same run chooses the same twice, and at least the longest row. The last layer's attention, of N scores to T
tokens, is counted at the most scores that a step's shortest rows can put into T tokens.

Measuring costs about a step. It comes before an engine takes the model: later every rank would have to take
part in each forward, and gradients were the engine's. So a model that is built in parts is not measured.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import ConfigError
from rayrm.train.evaluation import RowSet
from rayrm.train.footprint import Footprint, Probe, checkpointed_layers, without_checkpointing
from rayrm.train.peak_memory import free_bytes
from rayrm.train.rundir import record_budget, recorded_budget

logger = logging.getLogger("rayrm.train")

_GIB = 2**30
_SHARE = 0.6
"""Of the free memory. The rest is for other programs, fragmentation, and rows unlike the longest."""
_MOST_TOKENS = {"cpu": 8192, "cuda": 65536}
"""From here on a larger micro-batch is no faster."""
_UNMEASURED_TOKENS = 4096
"""A budget that leaves most memory to a large model."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the steps of a run ask of one rank. `longest` row and `most_tokens` of a step, in tokens: those of
    its part, where ranks compute rows together.

    `tokens` and `scores` `[rows + 1]`: what the first rows hold together, those with the least tokens a score
    first.
    """

    longest: int
    most_tokens: int
    tokens: npt.NDArray[np.int64]
    scores: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, index: RowIndex, layout: str, *, rows_per_rank: int, num_ranks: int, parts: int = 1
    ) -> Demand:
        """Of a run over these rows. `parts` ranks compute a row together, and stand here for one."""
        tokens = index.tokens(share=layout == "shared", padded=layout == "padded")
        # Ranks are balanced by tokens: none has more than an even share and one row.
        most_rows = min(rows_per_rank + (num_ranks > 1), len(tokens))
        largest = np.sort(tokens)[-most_rows:]
        most = most_rows * int(tokens.max()) if layout == "padded" else int(largest.sum())
        # Prompts may be common to all rows, and short rows all on one rank.
        alone = np.maximum(tokens - index.prefix_lengths, 1) if layout == "shared" else tokens
        densest = np.argsort(alone / index.num_completions, kind="stable")[: rows_per_rank * num_ranks]
        return cls(
            math.ceil(int(tokens.max()) / parts),
            math.ceil(most / parts),
            np.concatenate([[0], np.cumsum(alone[densest]) // parts]),
            np.concatenate([[0], np.cumsum(index.num_completions[densest])]),
        )

    def most_scores(self, num_tokens: int) -> float:
        """The most scores that a micro-batch of `num_tokens` can hold."""
        return float(np.interp(num_tokens, self.tokens, self.scores))


def given_budget(config: RewardConfig, longest: int) -> int | None:
    """The budget that is set; None: none is. Raises ConfigError where it is below the run's longest row."""
    budget, parts = config.max_tokens_per_microbatch, config.sequence_parallel_size
    if budget is not None and budget * parts < longest:
        among = f", over {parts} workers" if parts > 1 else ""
        raise ConfigError(
            f"`max_tokens_per_microbatch` ({budget}) is below the longest pair kept by `max_length` "
            f"({longest} tokens{among}). Raise it to {math.ceil(longest / parts)} or lower `max_length`."
        )
    return budget


def decide_budget(
    probe: Probe,
    rows: RowSet,
    config: RewardConfig,
    given: int | None,
    *,
    output_dir: Path,
    rank: int,
    num_ranks: int,
    measures: bool = True,
) -> int:
    """The budget of all ranks: as given, as chosen when the run began, or the least that a rank chooses now.

    What is chosen is written to the run directory. Every rank calls this. `measures=False`: the model cannot
    run yet, since no rank holds all of it.

    Raises:
        ConfigError: the longest row does not fit a budget that the settings name.
    """

    def say(message: str) -> None:
        if rank == 0:
            logger.info("%s", message)

    demand = _demand(probe, rows, config, num_ranks)
    if given is not None:
        if demand.longest > given and config.max_tokens_per_microbatch is not None:
            parts = config.sequence_parallel_size
            what = f"a worker's part (one of {parts}) of the longest row" if parts > 1 else "the longest row"
            raise ConfigError(
                f"`max_tokens_per_microbatch` ({given}) is below {what} ({demand.longest} tokens, "
                f"{probe.module.layout.name}). Raise it to {demand.longest} or lower `max_length`."
            )
        budget = max(demand.longest, given)
        # Chosen before, it was said then.
        if rank == 0 and measures and config.max_tokens_per_microbatch is not None:
            _say_of_given(probe, rows, config, demand, budget, num_ranks, say)
        return budget
    recorded = recorded_budget(output_dir)
    if recorded is None and not measures:
        recorded = max(demand.longest, _UNMEASURED_TOKENS)
        say(
            f"max_tokens_per_microbatch: {recorded} tokens (not measured: with `zero_init` the model comes "
            "in parts). Type another one where memory runs out, or much of it stays free"
        )
    free = _free_share(probe.device, num_ranks)
    budget = recorded or choose_budget(probe, rows, config, free=free, num_ranks=num_ranks, say=say)
    if num_ranks > 1:
        least = torch.tensor(budget, device=probe.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        if int(least) < budget:
            say(f"max_tokens_per_microbatch: {int(least)} tokens, since another rank has room for no more")
        budget = int(least)
    if rank == 0:
        record_budget(output_dir, budget)
    return budget


def _demand(probe: Probe, rows: RowSet, config: RewardConfig, num_ranks: int) -> Demand:
    parts = config.sequence_parallel_size
    return Demand.of(
        rows.index,
        probe.module.layout.name,
        rows_per_rank=config.train_batch_rows(1),
        num_ranks=num_ranks // parts,
        parts=parts,
    )


def _longest_row(probe: Probe, rows: RowSet) -> TokenizedRow:
    layout = probe.module.layout.name
    tokens = rows.index.tokens(share=layout == "shared", padded=layout == "padded")
    (row,) = rows.fetch([int(np.argmax(tokens))])
    return row


def choose_budget(
    probe: Probe,
    rows: RowSet,
    config: RewardConfig,
    *,
    free: int | None,
    num_ranks: int,
    say: Callable[[str], None],
) -> int:
    """This rank's token budget where `free` bytes are left (None: nobody knows).

    `say` is told how it was chosen, and where gradient checkpointing is not needed.
    """
    demand = _demand(probe, rows, config, num_ranks)
    longest = demand.longest
    most = _MOST_TOKENS.get(probe.device.type, _MOST_TOKENS["cpu"])
    if free is None:
        say(f"max_tokens_per_microbatch: {max(most, longest)} tokens (free memory is not known here)")
        return max(most, longest)
    room = _SHARE * max(0, free - _state_bytes(probe.module, config, num_ranks))
    row = _longest_row(probe, rows)
    found = probe.footprint(row)
    budget = max(longest, _largest_that_fits(found, demand, room, most))
    say(
        f"max_tokens_per_microbatch: {budget} tokens (measured: {found.per_token / 2**10:.0f} KiB a token, "
        f"{room / _GIB:.3g} GiB for them; the longest row has {longest})"
    )
    if found.of(longest) > room:
        say(
            f"the longest row ({longest} tokens) takes {found.of(longest) / _GIB:.2g} GiB and may not fit. "
            "Where memory runs out, lower `max_length`, or set `gradient_checkpointing=true` or "
            "`zero_stage=3`"
        )
    _say_where_storing_fits(probe, row, demand, found, room, budget, say)
    return budget


def _largest_that_fits(found: Footprint, demand: Demand, room: float, most: int) -> int:
    """The largest power of two up to `most` that `room` holds; 1 where none does."""
    tokens = 1 << (most.bit_length() - 1)
    while tokens > 1 and found.of(tokens, demand.most_scores(tokens)) > room:
        tokens //= 2
    return tokens


def _say_of_given(
    probe: Probe,
    rows: RowSet,
    config: RewardConfig,
    demand: Demand,
    budget: int,
    num_ranks: int,
    say: Callable[[str], None],
) -> None:
    """Of a budget that the user gives, only whether it is to be had without checkpointing."""
    free = _free_share(probe.device, num_ranks)
    if free is None or not checkpointed_layers(probe.module):
        return
    room = _SHARE * max(0, free - _state_bytes(probe.module, config, num_ranks))
    row = _longest_row(probe, rows)
    _say_where_storing_fits(probe, row, demand, probe.footprint(row), room, budget, say)


def _say_where_storing_fits(
    probe: Probe,
    row: TokenizedRow,
    demand: Demand,
    found: Footprint,
    room: float,
    budget: int,
    say: Callable[[str], None],
) -> None:
    """Say it where the run's micro-batches, or smaller ones, fit without gradient checkpointing.

    A micro-batch holds no more than the budget, and no more than a step gives a rank.
    """
    layers = checkpointed_layers(probe.module)
    # Without checkpointing a layer holds no more than it holds while it is recomputed. That much, far more
    # than it takes, must be there to try it; the share of `room` is for a whole run.
    if not layers or len(layers) * found.of(probe.num_tokens(row)) > room / _SHARE:
        return
    with without_checkpointing(layers):
        stored = probe.footprint(row)
    most = min(budget, demand.most_tokens)
    takes = stored.of(most, demand.most_scores(most))
    if takes <= room:
        say(
            f"gradient checkpointing is not needed: without it a micro-batch of {most} tokens takes "
            f"{takes / _GIB:.2g} of {room / _GIB:.3g} GiB. To save the time it takes: "
            "`gradient_checkpointing=false`"
        )
        return
    smaller = _largest_that_fits(stored, demand, room, most)
    if smaller < demand.longest:
        return
    takes = stored.of(smaller, demand.most_scores(smaller))
    say(
        f"gradient checkpointing is not needed with `max_tokens_per_microbatch={smaller}`: without it such a "
        f"micro-batch takes {takes / _GIB:.2g} of {room / _GIB:.3g} GiB, and the cut cannot change the loss. "
        f"To save the time it takes: `gradient_checkpointing=false max_tokens_per_microbatch={smaller}`"
    )


def _free_share(device: torch.device, num_ranks: int) -> int | None:
    """The bytes that this rank may take; the ranks of one machine share its memory."""
    free = free_bytes(device)
    if free is None or device.type == "cuda":
        return free
    # Ray Train and torch's launcher say how many of the ranks are here.
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))


def _state_bytes(module: torch.nn.Module, config: RewardConfig, num_ranks: int) -> float:
    """What training holds beside the model and its activations, at most.

    A gradient for each trained weight; and of this rank's share of them an optimizer's two moments and one
    copy more, ZeRO's own weights or what an update takes.
    """
    trained = sum(int(p.nbytes) for p in module.parameters() if p.requires_grad)
    return float(trained) * (1 + 3 / (num_ranks if resolved_stage(config) else 1))
