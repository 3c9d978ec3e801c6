"""The Bradley-Terry loss: the formula, its gradient, and no overflow."""

from __future__ import annotations

import math

import pytest
import torch

from rayrm.model.loss import DeviceTerms, row_losses
from rayrm.objective import Objective

BETTER = torch.tensor([0, 2, 0])
WORSE = torch.tensor([1, 3, 3])


def by_formula(
    scores: list[float], margin: list[float], weight: list[float], center: float | None
) -> tuple[float, list[float]]:
    """Value and gradient, in plain double arithmetic."""
    value, gradient = 0.0, [0.0] * len(scores)
    for b, w, m, weigh in zip(BETTER.tolist(), WORSE.tolist(), margin, weight, strict=True):
        difference = scores[b] - scores[w] - m
        value += weigh * math.log1p(math.exp(-difference))
        slope = -weigh / (1 + math.exp(difference))
        gradient[b] += slope
        gradient[w] -= slope
        if center is not None:
            total = scores[b] + scores[w]
            value += weigh * center * total**2
            gradient[b] += weigh * 2 * center * total
            gradient[w] += weigh * 2 * center * total
    return value, gradient


@pytest.mark.parametrize("center", [None, 0.01, 0.5])
@pytest.mark.parametrize("margin", [[0.0, 0.0, 0.0], [0.3, -0.2, 1.5]])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.5, 0.0, 2.0]])
def test_value_and_gradient_are_the_formula_s(
    center: float | None, margin: list[float], weight: list[float]
) -> None:
    raw = [0.7, -0.4, 1.9, 2.2]
    scores = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
    terms = DeviceTerms(
        better=BETTER,
        worse=WORSE,
        margin=torch.tensor(margin, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
    )
    loss = row_losses(scores, terms, Objective(center)).sum()
    loss.backward()
    value, gradient = by_formula(raw, margin, weight, center)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-12)


def one_pair(margin: float = 0.0, weight: float = 1.0) -> DeviceTerms:
    return DeviceTerms(
        better=torch.tensor([0]),
        worse=torch.tensor([1]),
        margin=torch.tensor([margin]),
        weight=torch.tensor([weight]),
    )


def loss_of(difference: float, margin: float = 0.0) -> tuple[float, float]:
    """Loss of one pair in float32, and its slope in the chosen score."""
    scores = torch.tensor([difference, 0.0], requires_grad=True)
    loss = row_losses(scores, one_pair(margin=margin), Objective()).sum()
    loss.backward()
    assert scores.grad is not None
    return loss.item(), float(scores.grad[0])


def test_equal_scores_cost_log_2() -> None:
    assert loss_of(0.0) == pytest.approx((math.log(2), -0.5), rel=1e-6)


@pytest.mark.parametrize(
    ("difference", "margin", "expected"),
    [(1e4, 0.0, (0.0, 0.0)), (-1e4, 0.0, (1e4, -1.0)), (0.0, 3e4, (3e4, -1.0)), (0.0, -3e4, (0.0, 0.0))],
)
def test_huge_differences_neither_overflow_nor_lose_their_slope(
    difference: float, margin: float, expected: tuple[float, float]
) -> None:
    assert loss_of(difference, margin) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_dummy_of_weight_zero_adds_nothing() -> None:
    scores = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = row_losses(scores, one_pair(weight=0.0), Objective(center=0.1)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]
