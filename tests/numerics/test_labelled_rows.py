"""Soft labels, ties, rankings as wholes and scores in one set: one loss and one gradient, however it is cut.

The reference runs transformers' own forward on one sequence at a time and adds up the written probabilities.
Ours is a whole run of one step; a step of SGD with a huge learning rate gives the gradients back.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.names import EVALUATED
from rayrm.objective import Objective
from tests.numerics.ranks import CENTER, HUGE, ONE_HUGE_STEP, TOLERANCE, Variant, outcome_of, run_variants
from tests.tiny import tiny_model

OBJECTIVES: dict[str, dict[str, Any]] = {
    "davidson": {
        "tie_model": "davidson",
        "tie_parameter": 0.8,
        "label_smoothing": 0.1,
        "pointwise_loss": "mse",
    },
    "rao-kupper": {"tie_model": "rao-kupper", "pointwise_loss": "bce"},
    "plackett-luce": {"ranking_loss": "plackett-luce", "pointwise_loss": "mse"},
}


def made_rows() -> list[TokenizedRow]:
    """Eight rows of all kinds, whose texts have beginnings in common."""
    rng = np.random.default_rng(11)

    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, 400, count)]

    def row(
        texts: list[list[int]], ranks: tuple[int, ...], margin: float = 0.0, **labels: Any
    ) -> TokenizedRow:
        return TokenizedRow.of([np.array(ids, np.int32) for ids in texts], ranks, margin, **labels)

    asked, other = words(24), words(12)
    best, good, bad = (asked + words(count) for count in (9, 6, 14))
    return [
        row([best, good], (0, 1), 0.5, target=0.7),
        row([asked + words(4), asked + words(11), asked + words(2), bad], (1, 0, 1, 2), 0.25),
        row([good], (-1,), ratings=(0.9,)),
        row([other + words(5), other + words(3), other], (-1, -1, -1), ratings=(0.1, 0.6, 0.3)),
        row([other + words(7), bad], (0, 1)),
        row([best, bad, good], (0, 2, 1)),
        row([asked + words(8), asked + words(8)], (0, 1), target=0.2),
        row([other + words(4), other + words(6), bad], (0, 0, 1)),
    ]


ROWS = made_rows()


@functools.cache
def reference(name: str) -> tuple[float, float, dict[str, torch.Tensor], list[float]]:
    """Loss, gradient norm, gradients and scores; every sequence by itself, every term by its probability."""
    objective = Objective.of(RewardConfig(**OBJECTIVES[name]))
    model = tiny_model(seed=1)
    total, seen = torch.zeros((), dtype=torch.float64), []
    for row in ROWS:
        scores = [
            model(input_ids=torch.tensor(ids[None]).long()).logits[0, 0].double() for ids in row.sequences
        ]
        seen += [score.item() for score in scores]
        total = total + loss_of(row, scores, objective)
    mean = total / len(ROWS)
    mean.backward()
    gradients = {key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return mean.item(), norm.item(), gradients, seen


def loss_of(row: TokenizedRow, scores: list[torch.Tensor], objective: Objective) -> torch.Tensor:
    if row.ratings:
        losses = []
        for score, y in zip(scores, row.ratings, strict=True):
            p = torch.sigmoid(score)
            bce = -y * torch.log(p) - (1 - y) * torch.log(1 - p)
            losses.append((score - y) ** 2 if objective.pointwise_loss == "mse" else bce)
        return torch.stack(losses).mean()
    compared, centers = [], []
    e = objective.label_smoothing
    share = row.target * (1 - e) + (1 - row.target) * e
    for i, above in enumerate(row.ranks):
        for j, below in enumerate(row.ranks):
            if above < below:
                win, loss, _ = probabilities(scores[i] - row.margin, scores[j], objective)
                compared.append(-share * torch.log(win) - (1 - share) * torch.log(loss))
            elif above == below and i < j and objective.ties:
                compared.append(-torch.log(probabilities(scores[i], scores[j], objective)[2]))
            else:
                continue
            centers.append(CENTER * (scores[i] + scores[j]) ** 2)
    if objective.listwise and len(row.ranks) > 2:
        compared = []
        for i, rank in enumerate(row.ranks):
            worse = [torch.exp(scores[j]) for j, other in enumerate(row.ranks) if other > rank]
            if worse:
                mine = torch.exp(scores[i] - row.margin)
                compared.append(-torch.log(mine / (mine + sum(worse))))
    return torch.stack(compared).mean() + torch.stack(centers).mean()


def probabilities(
    better: torch.Tensor, worse: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, parameter = torch.exp(better), torch.exp(worse), objective.tie_parameter
    if objective.tie_model == "rao-kupper":
        win, loss = first / (first + parameter * second), second / (second + parameter * first)
        return win, loss, (parameter**2 - 1) * win * loss
    both = parameter * torch.sqrt(first * second) if objective.tie_model == "davidson" else first * 0
    whole = first + second + both
    return first / whole, second / whole, both / whole


def variants(name: str) -> list[Variant]:
    one_row = max(len(row.ids) for row in ROWS)
    alone = max(sum(row.lengths) for row in ROWS)
    half = {"per_device_train_batch_size": 4}
    found = [
        Variant("shared"),
        Variant("one_row", max_tokens=one_row),
        Variant("two_ranks_one_row", half, max_tokens=one_row, num_ranks=2),
    ]
    if name == "davidson":
        found += [
            Variant("padded", padded=True),
            Variant("packed_one_row", {"share_prefix": False}, max_tokens=alone),
            Variant("accumulated", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
            Variant("two_ranks_zero3", {**half, "zero_stage": 3}, num_ranks=2),
            Variant("doubled", gradients_times=2.0),
        ]
    settings = {**ONE_HUGE_STEP, **OBJECTIVES[name]}
    return [replace(one, name=f"{name}-{one.name}", settings={**settings, **one.settings}) for one in found]


RIGHT = [(name, one.name) for name in OBJECTIVES for one in variants(name) if "doubled" not in one.name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    run_variants([one for name in OBJECTIVES for one in variants(name)], root, ROWS)
    return root


def differences(directory: Path, name: str) -> list[str]:
    """Where a run is not the reference's, in words."""
    loss, norm, gradients, _ = reference(name)
    outcome, start = outcome_of(directory), tiny_model(seed=1).state_dict()
    found = []
    if not abs(outcome.losses[0] - loss) <= TOLERANCE * loss:
        found.append(f"the loss is {outcome.losses[0]}, not {loss}")
    if not abs(outcome.norms[0] - norm) <= TOLERANCE * norm:
        found.append(f"the gradient norm is {outcome.norms[0]}, not {norm}")
    for key, wanted in gradients.items():
        gradient = (start[key].double() - outcome.weights[key].double()) / HUGE
        off = float((gradient - wanted).norm() / wanted.norm())
        if not off <= TOLERANCE:
            found.append(f"{key} differs by {off:.2e}")
    return found


@pytest.mark.parametrize(("name", "run"), RIGHT)
def test_loss_and_gradients_are_those_of_the_written_terms(runs: Path, name: str, run: str) -> None:
    assert differences(runs / run, name) == []


def test_the_comparison_sees_every_doubled_parameter(runs: Path) -> None:
    assert len(differences(runs / "davidson-doubled", "davidson")) >= len(reference("davidson")[2])


@pytest.mark.parametrize(("name", "run"), RIGHT)
def test_the_logged_metrics_are_the_evaluation_s(runs: Path, name: str, run: str) -> None:
    record = json.loads((runs / run / "metrics.jsonl").read_text().splitlines()[0])
    objective = replace(Objective.of(RewardConfig(**OBJECTIVES[name])), center=CENTER)
    expected = evaluate_scores(reference(name)[3], TokenizedSet.from_rows(ROWS).index, objective)
    assert set(expected) <= {*EVALUATED}
    for key in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "mse"):
        assert record[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
