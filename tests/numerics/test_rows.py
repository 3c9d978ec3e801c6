"""Rankings and rows that share: losses and gradients are those of their comparisons, computed one by one.

The reference knows nothing of rows, packing or sharing: it runs transformers' own forward on one sequence at
a time and adds up -log sigmoid over the comparisons, each of weight 1/n in its row. Ours is a whole run of
one step, as `train_rank` makes it; a step of SGD with a huge learning rate gives the gradients back.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout
from rayrm.objective import Objective
from rayrm.train.evaluation import score_rows
from tests.numerics.ranks import (
    CENTER,
    HUGE,
    ONE_HUGE_STEP,
    PLENTY,
    TOLERANCE,
    Variant,
    outcome_of,
    run_variants,
)
from tests.tiny import tiny_model


@dataclass(frozen=True)
class Ranked:
    """A row as its source says it: whole sequences, any numbers as ranks."""

    sequences: list[list[int]]
    ranks: list[float]
    margin: float = 0.0

    @property
    def row(self) -> TokenizedRow:
        order = sorted(set(self.ranks))
        sequences = [np.array(ids, np.int32) for ids in self.sequences]
        return TokenizedRow.of(sequences, [order.index(rank) for rank in self.ranks], self.margin)


def made_rows() -> list[Ranked]:
    """Eight rows: rankings with ties and repeats, pairs of one prompt, a completion in several pairs."""
    rng = np.random.default_rng(7)

    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, 400, count)]

    asked, other, third = words(30), words(12), words(21)
    start = words(5)
    answers = [start + words(9), start + words(3), words(14), words(1), start + words(8)]
    best, good, bad = (asked + words(count) for count in (11, 6, 17))
    return [
        Ranked([asked + answer for answer in answers], [2, 1, 1, 3, 1], margin=0.25),
        Ranked([best, good], [0, 1], margin=0.5),
        Ranked([best, bad], [0, 1]),
        Ranked([good, bad], [0, 1], margin=-0.25),
        Ranked([other + words(7), other + words(2), other], [0.5, -2, 9]),
        Ranked([third + answers[0], third + answers[1], third + answers[0]], [1, 0, 1]),
        Ranked([other + words(4), asked + words(4)], [1, 0]),
        Ranked([third + answers[2], third + answers[3]], [0, 1]),
    ]


ROWS = made_rows()


@functools.cache
def reference() -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients, comparison by comparison, every sequence by itself."""
    model = tiny_model(seed=1)
    total = torch.zeros(())
    for row in ROWS:
        told = [
            (i, j) for i, above in enumerate(row.ranks) for j, below in enumerate(row.ranks) if above < below
        ]
        for i, j in told:
            better, worse = (
                model(input_ids=torch.tensor([row.sequences[place]])).logits[0, 0] for place in (i, j)
            )
            loss = -F.logsigmoid(better - worse - row.margin) + CENTER * (better + worse) ** 2
            total = total + loss / len(told)
    mean = total / len(ROWS)
    mean.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return mean.item(), norm.item(), gradients


def num_prefixes(rows: list[Ranked]) -> int:
    sequences = [ids for row in rows for ids in row.sequences]
    return len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


def forms() -> list[Variant]:
    longest = max(sum(map(len, row.sequences)) for row in ROWS)
    return [
        Variant("shared"),
        Variant("packed", {"share_prefix": False}),
        Variant("padded", padded=True),
        Variant("checkpointed", {"gradient_checkpointing": True}),
        Variant("small_budget", max_tokens=max(len(row.row.ids) for row in ROWS)),
        Variant("packed_small_budget", {"share_prefix": False}, max_tokens=longest),
        Variant("accumulated", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
        Variant("zero2", {"zero_stage": 2}),
        # Ranks have unequal shares, so that a dummy row takes part.
        Variant("two_ranks", {"per_device_train_batch_size": 4}, num_ranks=2),
        Variant(
            "two_ranks_small_budget",
            {"per_device_train_batch_size": 4},
            max_tokens=max(len(row.row.ids) for row in ROWS),
            num_ranks=2,
        ),
        Variant("two_ranks_zero3", {"per_device_train_batch_size": 4, "zero_stage": 3}, num_ranks=2),
    ]


WRONG = {
    "doubled": Variant("doubled", gradients_times=2.0),
    "frozen": Variant("frozen", {"learning_rate": 0.0}),
}
FORMS = [form.name for form in forms()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    variants = [
        replace(form, settings={**ONE_HUGE_STEP, **form.settings}) for form in [*forms(), *WRONG.values()]
    ]
    run_variants(variants, root, [row.row for row in ROWS])
    # The rows in another order, and the completions of each too.
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    turned = [Ranked(ROWS[i].sequences[::-1], ROWS[i].ranks[::-1], ROWS[i].margin) for i in order]
    run_variants([Variant("turned", ONE_HUGE_STEP)], root, [row.row for row in turned])
    return root


def differences(directory: Path) -> list[str]:
    """Where a run is not the reference's, in words."""
    loss, norm, gradients = reference()
    outcome = outcome_of(directory)
    start = tiny_model(seed=1).state_dict()
    found = []
    if not abs(outcome.losses[0] - loss) <= TOLERANCE * loss:
        found.append(f"the loss is {outcome.losses[0]}, not {loss}")
    if not abs(outcome.norms[0] - norm) <= TOLERANCE * norm:
        found.append(f"the gradient norm is {outcome.norms[0]}, not {norm}")
    for name, wanted in gradients.items():
        gradient = (start[name].double() - outcome.weights[name].double()) / HUGE
        off = float((gradient - wanted).norm() / wanted.norm())
        if not off <= TOLERANCE:
            found.append(f"{name} differs by {off:.2e}")
    return found


@pytest.mark.parametrize("form", [*FORMS, "turned"])
def test_rows_have_the_loss_and_gradients_of_their_comparisons(runs: Path, form: str) -> None:
    assert differences(runs / form) == []


@pytest.mark.parametrize("form", WRONG)
def test_the_comparison_sees_every_wrong_parameter(runs: Path, form: str) -> None:
    assert len(differences(runs / form)) >= len(reference()[2])


def first_record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    return record


@pytest.mark.parametrize("form", ["shared", "turned", "accumulated"])
def test_each_distinct_beginning_of_a_step_is_computed_once(runs: Path, form: str) -> None:
    record = first_record(runs / form)
    assert record["num_tokens"] == sum(len(ids) for row in ROWS for ids in row.sequences)
    assert record["num_tokens_computed"] == num_prefixes(ROWS)


def test_without_sharing_a_completion_of_a_ranking_is_still_computed_once(runs: Path) -> None:
    record = first_record(runs / "packed")
    assert record["num_tokens_computed"] == record["num_tokens"]


def test_padding_counts_as_computed(runs: Path) -> None:
    record = first_record(runs / "padded")
    lengths = [len(ids) for row in ROWS for ids in row.sequences]
    assert record["num_tokens"] == sum(lengths)
    assert record["num_tokens_computed"] == len(lengths) * max(lengths) > sum(lengths)


@pytest.mark.parametrize("form", FORMS)
def test_the_logged_metrics_weigh_rows(runs: Path, form: str) -> None:
    """By the evaluation's definition, from scores that the stock model gives one by one."""
    model = tiny_model(seed=1).eval()
    with torch.inference_mode():
        scores = [model(input_ids=torch.tensor([ids])).logits.item() for row in ROWS for ids in row.sequences]
    index = TokenizedSet.from_rows([row.row for row in ROWS]).index
    expected = evaluate_scores(scores, index, Objective(CENTER))
    record = first_record(runs / form)
    for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, PLENTY])
def test_evaluation_scores_every_completion_as_the_stock_model_does(layout: Any, max_tokens: int) -> None:
    model = tiny_model(seed=1).eval()
    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for row in ROWS for ids in row.sequences]
    scorer = PackedScorer(tiny_model(seed=1), Layout(layout)).eval()
    found = score_rows(
        scorer,
        TokenizedSet.from_rows([row.row for row in ROWS]),
        layout=Layout(layout),
        path=scorer.path,
        pad_token_id=0,
        max_tokens=max_tokens,
        device=torch.device("cpu"),
    )
    np.testing.assert_allclose(found, alone, atol=1e-5)
