"""The loss of a micro-batch's terms: the caller adds up, and divides once, by the step's row count.

Shapes: N scores; C comparisons, Q stages of rankings, V scored completions, E ratings by A attributes (see
`data/terms.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayrm.data.terms import Terms
from rayrm.model.attribute_head import split_outputs
from rayrm.model.objectives import attribute_losses, comparison_losses, pointwise_losses, stage_losses
from rayrm.objective import Objective


@dataclass(frozen=True, slots=True)
class DeviceStages:
    """`Stages` as tensors: `members` `[Q, K]`; `margin`, `weight` `[Q]`."""

    members: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceRated:
    """`Rated` as tensors, each `[V]`."""

    place: torch.Tensor
    rating: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceAttributed:
    """`Attributed` as tensors, each `[E]`."""

    place: torch.Tensor
    column: torch.Tensor
    rating: torch.Tensor
    weight: torch.Tensor
    alone: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTerms:
    """`Terms` as tensors, each `[C]`; what no row of the batch has is None."""

    better: torch.Tensor
    worse: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor | None = None
    tie: torch.Tensor | None = None
    in_stages: torch.Tensor | None = None
    stages: DeviceStages | None = None
    rated: DeviceRated | None = None
    attributed: DeviceAttributed | None = None


def tensors_of(terms: Terms, tensor: Callable[[object], torch.Tensor]) -> dict[str, Any]:
    """The fields of `DeviceTerms`, each array made a tensor by `tensor`."""
    stages, rated = terms.stages, terms.rated
    names = ("better", "worse", "margin", "weight", "target", "tie", "in_stages")
    arrays = {name: getattr(terms, name) for name in names}
    found: dict[str, Any] = {name: None if array is None else tensor(array) for name, array in arrays.items()}
    if stages is not None:
        found["stages"] = DeviceStages(*map(tensor, (stages.members, stages.margin, stages.weight)))
    if rated is not None:
        found["rated"] = DeviceRated(*map(tensor, (rated.place, rated.rating, rated.weight)))
    if (by := terms.attributed) is not None:
        found["attributed"] = DeviceAttributed(
            *map(tensor, (by.place, by.column, by.rating, by.weight, by.alone))
        )
    return found


def row_losses(outputs: torch.Tensor, terms: DeviceTerms, objective: Objective) -> torch.Tensor:
    """The weighted loss of each term, `[C + Q + V + E]`: comparisons, stages, scored completions, ratings.

        w_c * [ L(r_better - r_worse - m_c)  +  k * (r_better + r_worse)^2 ]

    for a comparison c, where L is -log sigmoid for plain pairs: the Bradley-Terry likelihood as InstructGPT
    trains it (https://arxiv.org/abs/2203.02155, section 3.5), with the margin m of Llama 2
    (https://arxiv.org/abs/2307.09288, equation 2); the second term centers the rewards
    (https://arxiv.org/abs/2312.09244, equation 2) with `objective.center` k. Soft labels, ties, stages,
    scores and ratings: `model/objectives.py`. A comparison of a ranking that has stages keeps only its second
    term.

    `outputs` in float32: scores `[N]`, or with attributes `[N, 1 + A]`, the scores first.
    """
    scores, foretold = split_outputs(outputs)
    r_better, r_worse = scores[terms.better], scores[terms.worse]
    losses = comparison_losses(r_better - r_worse - terms.margin, objective, terms.target, terms.tie)
    if terms.in_stages is not None:
        losses = losses.masked_fill(terms.in_stages, 0.0)
    if objective.center is not None:
        losses = losses + objective.center * (r_better + r_worse).square()
    parts = [losses * terms.weight]
    if (stages := terms.stages) is not None:
        parts.append(stage_losses(scores, stages.members, stages.margin) * stages.weight)
    if (rated := terms.rated) is not None:
        losses = pointwise_losses(scores[rated.place], rated.rating, objective.pointwise_loss)
        parts.append(losses * rated.weight)
    if (by := terms.attributed) is not None:
        assert foretold is not None
        losses = attribute_losses(foretold[by.place, by.column], by.rating)
        parts.append(objective.attribute_weight * losses * by.weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
