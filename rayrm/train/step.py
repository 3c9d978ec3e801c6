"""One optimizer step: count first, sum the loss, divide once by the same number on every rank.

Shapes: N scores, C comparisons of a micro-batch. What the step reports is summed on the device and read only
when something is logged: in fp32 and bf16 there is no host sync inside a step (`tests/unit/test_no_sync.py`).
Two wait for the device in each: fp16, whose loss scale is read to see whether gradients overflowed, and
DeepSpeed, which checks and clips on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayrm.data.packing import PackedBatch
from rayrm.model.forward import to_device
from rayrm.model.loss import bradley_terry_losses
from rayrm.train.engine import Engine


@dataclass(frozen=True, slots=True)
class StepTotals:
    """One rank's share of a step, on the device: `sums` `[5]` add over ranks, of `extremes` `[2]` the least.

    sums: loss (already divided by the step's rows), rows won, margin, reward over all scores, weight of rows.
    extremes: the least score, minus the greatest. `grad_norm` is the global norm before clipping.
    `nonfinite` `[C]`: which comparisons of this rank have an infinite or NaN loss.
    """

    sums: torch.Tensor
    extremes: torch.Tensor
    grad_norm: torch.Tensor
    nonfinite: torch.Tensor

    @classmethod
    def none(cls, device: torch.device) -> StepTotals:
        """Those of no row at all."""
        return cls(*_zeros(device), torch.zeros((), device=device), torch.zeros(0, device=device))


def computed_tokens(batch: PackedBatch, *, padded: bool) -> int:
    """What the model computes of a micro-batch, as a plan counts it: padded, each row is as its longest."""
    return int(batch.length.max()) * len(batch.length) if padded else batch.num_tokens


def train_step(
    engine: Engine,
    microbatches: Sequence[PackedBatch],
    num_rows: int,
    *,
    center_rewards_coefficient: float | None = None,
    spoils: bool = False,
) -> StepTotals:
    """Forward and backward over this rank's micro-batches, then one update.

    `num_rows` is the step's row count over all ranks: the one denominator. `spoils`: a loss that is not
    finite makes all gradients NaN, so that the norm tells every rank of it.
    """
    sums, extremes = _zeros(engine.device)
    nonfinite = []
    for microbatch in microbatches:
        batch = to_device(microbatch, engine.device, engine.module.path)
        scores = engine.scores(batch)
        losses = bradley_terry_losses(
            scores,
            batch.better,
            batch.worse,
            margin=batch.margin,
            weight=batch.weight,
            center_rewards_coefficient=center_rewards_coefficient,
        )
        loss = losses.sum()
        if spoils:
            loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        # Engines average gradients over ranks: x world size makes it a sum, / num_rows the step's mean.
        engine.backward(loss * (engine.world_size / num_rows))
        with torch.no_grad():
            nonfinite.append(~torch.isfinite(losses))
            _add_totals(sums, extremes, loss / num_rows, scores, batch.better, batch.worse, batch.weight)
    return StepTotals(sums, extremes, engine.step(), torch.cat(nonfinite))


def _zeros(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    return sums, torch.full((2,), torch.inf, dtype=torch.float64, device=device)


def _add_totals(
    sums: torch.Tensor,
    extremes: torch.Tensor,
    loss: torch.Tensor,
    scores: torch.Tensor,
    better: torch.Tensor,
    worse: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    above, below = scores[better].double(), scores[worse].double()
    weight = weight.double()
    sums += torch.stack(
        [
            loss.double(),
            ((above > below) * weight).sum(),
            ((above - below) * weight).sum(),
            ((above + below) / 2 * weight).sum(),
            weight.sum(),
        ]
    )
    # A dummy row has weight 0 and must not set the extremes.
    counts = weight > 0
    lowest = torch.where(counts, torch.minimum(above, below), torch.inf).min()
    highest = torch.where(counts, torch.maximum(above, below), -torch.inf).max()
    torch.minimum(extremes, torch.stack([lowest, -highest]), out=extremes)
