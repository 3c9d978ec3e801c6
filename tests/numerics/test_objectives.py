"""Soft labels, ties, rankings as wholes and scores: values and gradients are those of the written formulas.

The reference is plain double arithmetic: probabilities as the papers write them, and central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayrm.data.packing import pack_rows
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.loss import DeviceTerms, row_losses, tensors_of
from rayrm.objective import Objective

# Central differences of width 1e-5 in float64 are good to about 1e-10 of these values' size.
STEP, TOLERANCE = 1e-5, 1e-7
SCORES = [0.7, -0.4, 1.9, 2.2, -1.3, 0.1, 0.9, -0.2]
Formula = Callable[[list[float]], float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def probabilities(better: float, worse: float, objective: Objective) -> tuple[float, float, float]:
    """Of win, loss and tie, as the papers write them: strengths are exp(reward)."""
    first, second, parameter = math.exp(better), math.exp(worse), objective.tie_parameter
    if objective.tie_model == "rao-kupper":
        win, loss = first / (first + parameter * second), second / (second + parameter * first)
        return win, loss, (parameter**2 - 1) * win * loss
    if objective.tie_model == "davidson":
        geometric = parameter * math.sqrt(first * second)
        whole = first + second + geometric
        return first / whole, second / whole, geometric / whole
    return first / (first + second), second / (first + second), 0.0


def row(ranks: tuple[int, ...], margin: float = 0.0, **labels: Any) -> TokenizedRow:
    sequences = [np.array([1, 10 + place], np.int32) for place in range(len(ranks))]
    return TokenizedRow.of(sequences, ranks, margin, **labels)


ROWS = [
    row((0, 1), margin=0.3, target=0.8),
    row((0, 0)),
    row((1, 0, 1), margin=-0.2),
    row((-1,), ratings=(0.25,)),
]
"""Eight scores: a soft pair, a tie, a ranking with a tie, a scored completion."""
FIRST = (0, 2, 4, 7)


def by_formula(scores: list[float], objective: Objective) -> float:
    """The loss of ROWS, written out."""
    smoothing, center = objective.label_smoothing, objective.center or 0.0

    def compared(i: int, j: int, margin: float, target: float) -> float:
        win, loss, _ = probabilities(scores[i] - margin, scores[j], objective)
        share = target * (1 - smoothing) + (1 - target) * smoothing
        return -share * math.log(win) - (1 - share) * math.log(loss) + center * (scores[i] + scores[j]) ** 2

    def tied(i: int, j: int) -> float:
        return (
            -math.log(probabilities(scores[i], scores[j], objective)[2])
            + center * (scores[i] + scores[j]) ** 2
        )

    total = compared(0, 1, 0.3, 0.8)
    if objective.ties:
        total += tied(2, 3)
    if objective.listwise:
        # One completion is best; the two others are equal.
        chosen = math.exp(scores[5] + 0.2)
        total += -math.log(chosen / (chosen + math.exp(scores[4]) + math.exp(scores[6])))
        total += center * ((scores[5] + scores[4]) ** 2 + (scores[5] + scores[6]) ** 2) / 2
    else:
        parts = [compared(5, 4, -0.2, 1.0), compared(5, 6, -0.2, 1.0)]
        parts += [tied(4, 6)] if objective.ties else []
        total += sum(parts) / len(parts)
    rating = 0.25
    if objective.pointwise_loss == "mse":
        total += (scores[7] - rating) ** 2
    else:
        total -= rating * math.log(sigmoid(scores[7])) + (1 - rating) * math.log(1 - sigmoid(scores[7]))
    return total


OBJECTIVES = {
    "soft": Objective(pointwise_loss="mse"),
    "smoothed": Objective(label_smoothing=0.1, pointwise_loss="bce"),
    "davidson": Objective(0.05, 0.0, "davidson", 0.7, pointwise_loss="mse"),
    "davidson smoothed": Objective(None, 0.2, "davidson", 2.0, pointwise_loss="mse"),
    "rao-kupper": Objective(0.05, 0.0, "rao-kupper", 1.5, pointwise_loss="bce"),
    "rao-kupper smoothed": Objective(None, 0.1, "rao-kupper", 3.0, pointwise_loss="bce"),
    "plackett-luce": Objective(0.05, ranking_loss="plackett-luce", pointwise_loss="mse"),
}


def terms_of(rows: list[TokenizedRow], objective: Objective) -> DeviceTerms:
    def tensor(array: Any) -> torch.Tensor:
        made = torch.from_numpy(np.asarray(array))
        return made.double() if made.is_floating_point() else made

    return DeviceTerms(**tensors_of(pack_rows(rows, None, objective=objective), tensor))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_the_formula_s(name: str) -> None:
    objective = OBJECTIVES[name]
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    loss = row_losses(scores, terms_of(ROWS, objective), objective).sum()
    loss.backward()
    # Margins and targets are float32 in a batch.
    assert loss.item() == pytest.approx(by_formula(SCORES, objective), rel=TOLERANCE)
    assert scores.grad is not None
    for place, slope in enumerate(scores.grad.tolist()):
        up, down = (
            by_formula([s + sign * STEP * (n == place) for n, s in enumerate(SCORES)], objective)
            for sign in (1, -1)
        )
        assert slope == pytest.approx((up - down) / (2 * STEP), rel=1e-6, abs=1e-7), place


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_s_loss_is_training_s(name: str) -> None:
    objective = OBJECTIVES[name]
    rows = ROWS if objective.ties else [ROWS[0], *ROWS[2:]]
    scores = SCORES if objective.ties else [*SCORES[:2], *SCORES[4:]]
    found = evaluate_scores(scores, TokenizedSet.from_rows(rows).index, objective)
    assert found["loss"] == pytest.approx(by_formula(SCORES, objective) / len(rows), rel=TOLERANCE)


@pytest.mark.parametrize("model", ["rao-kupper", "davidson"])
@pytest.mark.parametrize("difference", [-3.0, 0.0, 0.4, 25.0])
def test_win_loss_and_tie_are_all_that_can_happen(model: Any, difference: float) -> None:
    from rayrm.model.objectives import tie_model_losses

    objective = Objective(tie_model=model, tie_parameter=1.7)
    losses = tie_model_losses(torch.tensor([difference], dtype=torch.float64), objective)
    assert sum(math.exp(-loss.item()) for loss in losses) == pytest.approx(1.0, rel=1e-12)


def test_equal_rewards_tie_one_time_in_two_by_default() -> None:
    from rayrm.config import RewardConfig
    from rayrm.model.objectives import tie_model_losses

    for model in ("rao-kupper", "davidson"):
        objective = Objective.of(RewardConfig(tie_model=model))
        _, _, tie = tie_model_losses(torch.zeros(1), objective)
        assert math.exp(-tie.item()) == pytest.approx(1 / 2, rel=1e-6)


def test_plain_pairs_cost_to_the_bit_what_they_always_did() -> None:
    torch.manual_seed(0)
    scores = (4 * torch.randn(400)).requires_grad_()
    better, worse = torch.arange(0, 400, 2), torch.arange(1, 400, 2)
    margin, weight = torch.randn(200), torch.rand(200)
    terms = DeviceTerms(better=better, worse=worse, margin=margin, weight=weight)
    plain = -F.logsigmoid(scores[better] - scores[worse] - margin)
    plain = (plain + 0.01 * (scores[better] + scores[worse]).square()) * weight
    (wanted,) = torch.autograd.grad(plain.sum(), scores)
    losses = row_losses(scores, terms, Objective(0.01))
    (found,) = torch.autograd.grad(losses.sum(), scores)
    assert torch.equal(losses, plain)
    assert torch.equal(found, wanted)


def test_rows_that_say_nothing_more_have_the_arrays_of_pairs() -> None:
    batch = pack_rows([row((0, 1)), row((2, 0, 1))], None)
    assert (batch.target, batch.tie, batch.in_stages, batch.stages, batch.rated) == (None,) * 5


def test_a_sure_target_is_the_plain_loss_and_an_even_one_asks_for_equal_rewards() -> None:
    def slopes(target: float) -> list[float]:
        scores = torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True)
        row_losses(scores, terms_of([row((0, 1), target=target)], Objective()), Objective()).sum().backward()
        assert scores.grad is not None
        return scores.grad.tolist()

    assert slopes(1.0)[0] == pytest.approx(sigmoid(0.7) - 1)
    assert slopes(0.0)[0] == pytest.approx(sigmoid(0.7))
    assert slopes(0.5)[0] == pytest.approx(sigmoid(0.7) - 0.5)


def test_a_ranking_of_four_is_three_choices_of_equal_weight() -> None:
    objective = Objective(ranking_loss="plackett-luce")
    scores = [0.3, 1.1, -0.4, 0.8]
    ranked = row((2, 0, 3, 1))
    order = [1, 3, 0, 2]
    wanted = 0.0
    for place, winner in enumerate(order[:-1]):
        rest = sum(math.exp(scores[other]) for other in order[place:])
        wanted -= math.log(math.exp(scores[winner]) / rest) / 3
    losses = row_losses(torch.tensor(scores, dtype=torch.float64), terms_of([ranked], objective), objective)
    # Thirds are float32 in a batch.
    assert losses.sum().item() == pytest.approx(wanted, rel=TOLERANCE)


def test_a_pair_is_the_same_with_plackett_luce() -> None:
    listwise = Objective(ranking_loss="plackett-luce")
    scores = torch.tensor([0.3, 1.1])
    plain, whole = (
        row_losses(scores, terms_of([row((1, 0), margin=0.5, target=0.9)], objective), objective)
        for objective in (Objective(), listwise)
    )
    assert torch.equal(plain, whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_huge_scores_neither_overflow_nor_lose_their_slope(name: str) -> None:
    objective = OBJECTIVES[name]
    for sign in (1.0, -1.0):
        scores = torch.tensor([sign * 1e4 * (-1) ** n for n in range(8)], requires_grad=True)
        loss = row_losses(scores, terms_of(ROWS, objective), objective).sum()
        loss.backward()
        assert scores.grad is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(scores.grad).all()
        assert bool((scores.grad != 0).any())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_is_known_by_its_row(name: str) -> None:
    objective = OBJECTIVES[name]
    rows = ROWS if objective.ties else [ROWS[0], *ROWS[2:]]
    batch = pack_rows(rows, None, objective=objective)
    terms = DeviceTerms(**tensors_of(batch, torch.as_tensor))
    first = 0
    for number, row in enumerate(rows):
        scores = torch.zeros(batch.num_scores)
        scores[first : first + len(row.lengths)] = torch.nan
        first += len(row.lengths)
        bad = row_losses(scores, terms, objective).isnan().tolist()
        assert {of for of, is_bad in zip(batch.term_rows, bad, strict=True) if is_bad} == {number}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dummies_add_nothing(name: str) -> None:
    objective = OBJECTIVES[name]
    batch = pack_rows(ROWS, None, objective=objective, weights=[0.0] * len(ROWS))
    scores = torch.tensor(SCORES, requires_grad=True)
    losses = row_losses(scores, DeviceTerms(**tensors_of(batch, torch.as_tensor)), objective)
    losses.sum().backward()
    assert losses.sum().item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()
