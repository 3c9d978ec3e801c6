"""One optimizer step: count first, sum the loss, divide once by the same number on every rank.

Shapes: N scores, C comparisons, V scored completions of a micro-batch. What the step reports is summed on the
device and read only when something is logged: in fp32 and bf16 there is no host sync inside a step
(`tests/unit/test_no_sync.py`). Two wait for the device in each: fp16, whose gradient norm tells whether
gradients overflowed, and DeepSpeed, which checks and clips on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayrm.data.packing import PackedBatch
from rayrm.model.attribute_head import split_outputs
from rayrm.model.forward import to_device
from rayrm.model.loss import DeviceTerms, row_losses
from rayrm.model.objectives import rating_of
from rayrm.objective import Objective
from rayrm.train.engine import Engine

NUM_SUMS = 8


@dataclass(frozen=True, slots=True)
class StepTotals:
    """One rank's share of a step, on the device: `sums` `[8]` add over ranks, of `extremes` `[2]` the least.

    sums: loss (already divided by the step's rows), rows won, margin, reward over all scores, weight of rows,
    of those where one completion is to win, squared error of scored completions, and their weight.
    extremes: the least score, minus the greatest. `grad_norm` is the global norm before clipping.
    `nonfinite`: which of this rank's terms (see `row_losses`) have an infinite or NaN loss.
    """

    sums: torch.Tensor
    extremes: torch.Tensor
    grad_norm: torch.Tensor
    nonfinite: torch.Tensor

    @classmethod
    def none(cls, device: torch.device) -> StepTotals:
        """Those of no row at all."""
        return cls(*_zeros(device), torch.zeros((), device=device), torch.zeros(0, device=device))


def computed_tokens(batch: PackedBatch, *, padded: bool, parts: int = 1) -> int:
    """What the model computes of a micro-batch, as a plan counts it: padded, each row is as its longest.

    `parts`: how many ranks share the batch; the number is of one of them.
    """
    return int(batch.length.max()) * len(batch.length) if padded else math.ceil(batch.num_tokens / parts)


def train_step(
    engine: Engine,
    microbatches: Sequence[PackedBatch],
    num_rows: int,
    *,
    objective: Objective | None = None,
    spoils: bool = False,
) -> StepTotals:
    """Forward and backward over this rank's micro-batches, then one update.

    `num_rows` is the step's row count over all ranks: the one denominator. `objective`: of the rows as they
    were packed (None: the usual one). `spoils`: a loss that is not
    finite makes all gradients NaN, so that the norm tells every rank of it.
    """
    objective = objective or Objective()
    sums, extremes = _zeros(engine.device)
    nonfinite = []
    part = engine.module.part
    for microbatch in microbatches:
        batch = to_device(microbatch, engine.device, engine.module.path, part)
        outputs = engine.scores(batch)
        losses = row_losses(outputs, batch, objective)
        loss = losses.sum()
        if spoils:
            loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        # Engines average gradients over ranks: x world size makes it a sum, / num_rows the step's mean.
        engine.backward(loss * (engine.world_size / num_rows))
        with torch.no_grad():
            nonfinite.append(~torch.isfinite(losses))
            if part is None or part.counts:
                scores, _ = split_outputs(outputs)
                _add_totals(sums, extremes, loss / num_rows, scores, batch, objective)
    return StepTotals(sums, extremes, engine.step(), torch.cat(nonfinite))


def _zeros(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    return sums, torch.full((2,), torch.inf, dtype=torch.float64, device=device)


def _add_totals(
    sums: torch.Tensor,
    extremes: torch.Tensor,
    loss: torch.Tensor,
    scores: torch.Tensor,
    terms: DeviceTerms,
    objective: Objective,
) -> None:
    above, below = scores[terms.better].double(), scores[terms.worse].double()
    weight, ahead = terms.weight.double(), above - below
    decided = weight
    if terms.target is not None or terms.tie is not None:
        direction = _direction(terms)
        ahead, decided = ahead * direction, weight * direction.abs()
    parts = [
        loss.double(),
        ((ahead > 0) * decided).sum(),
        (ahead * decided).sum(),
        ((above + below) / 2 * weight).sum(),
        weight.sum(),
        decided.sum(),
    ]
    sums[: len(parts)] += torch.stack(parts)
    _add_extremes(extremes, torch.minimum(above, below), torch.maximum(above, below), weight)
    if (rated := terms.rated) is not None:
        rewards, weight = scores[rated.place].double(), rated.weight.double()
        error = rating_of(rewards, objective.pointwise_loss) - rated.rating.double()
        sums[3:] += torch.stack(
            [
                (rewards * weight).sum(),
                weight.sum(),
                weight.new_zeros(()),
                (error.square() * weight).sum(),
                weight.sum(),
            ]
        )
        _add_extremes(extremes, rewards, rewards, weight)
    if (by := terms.attributed) is not None:
        rewards, weight = scores[by.place].double(), by.alone.double()
        sums[3:5] += torch.stack([(rewards * weight).sum(), weight.sum()])
        _add_extremes(extremes, rewards, rewards, weight)


def _direction(terms: DeviceTerms) -> torch.Tensor:
    """1 where better is to win, -1 where worse is the likelier winner, 0 where neither, `[C]`."""
    found = torch.ones_like(terms.weight) if terms.target is None else torch.sign(terms.target - 0.5)
    if terms.tie is not None:
        found = found.masked_fill(terms.tie, 0.0)
    return found.double()


def _add_extremes(
    extremes: torch.Tensor, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor
) -> None:
    # A dummy row has weight 0 and must not set the extremes.
    counts = weight > 0
    least = torch.where(counts, low, torch.inf)
    most = torch.where(counts, -high, torch.inf)
    # Without a term there is nothing to take the least of.
    whole = extremes.new_full((1,), torch.inf)
    found = [torch.cat([whole, part]).min() for part in (least, most)]
    torch.minimum(extremes, torch.stack(found), out=extremes)
