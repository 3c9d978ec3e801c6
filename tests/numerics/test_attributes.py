"""Heads by attribute: gradients are those of the written formulas, and the saved model is a stock classifier.

References: plain double arithmetic with central differences; transformers' own forward on one sequence at a
time with the terms written out; stock classes on what a run saved.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.evaluation.evaluate import objective_of
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.attribute_head import HEADS_FILE, AttributeHead, attribute_head_of
from rayrm.model.loss import DeviceTerms, row_losses, tensors_of
from rayrm.model.reward_model import load_saved
from rayrm.objective import Objective
from rayrm.train.attributes import give_attributes, reopen_attributes
from rayrm.train.evaluation import score_model
from rayrm.train.worker import train_rank
from tests.numerics.ranks import (
    CENTER,
    HUGE,
    ONE_HUGE_STEP,
    TOLERANCE,
    Variant,
    job_of,
    outcome_of,
    run_variants,
)
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = ["good", "long", "odd"]
NAN = math.nan
WEIGHT = 0.7
SETTINGS: dict[str, Any] = {
    "attributes": NAMES,
    "attribute_weight": WEIGHT,
    "pointwise_loss": "mse",
    "tie_model": "davidson",
    "tie_parameter": 1.0,
}
PROBE = {**SETTINGS, **ONE_HUGE_STEP}


def made_rows() -> list[TokenizedRow]:
    """Eight rows: compared, scored, and rated by some attributes or by none."""
    rng = np.random.default_rng(11)

    def words(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, 400, count)]

    def row(texts: list[list[int]], ranks: tuple[int, ...], **labels: Any) -> TokenizedRow:
        return TokenizedRow.of([np.array(ids, np.int32) for ids in texts], ranks, **labels)

    asked, other = words(24), words(12)
    best, good, bad = (asked + words(count) for count in (9, 6, 14))
    return [
        row([best, good], (0, 1), attributes=(2.0, NAN, 0.5, 1.0, NAN, NAN)),
        row([asked + words(4), asked + words(11), bad], (1, 0, 2), attributes=(NAN,) * 8 + (3.0,)),
        row([good], (-1,), attributes=(NAN, -1.5, NAN)),
        row([other + words(5), other], (-1, -1), ratings=(0.1, 0.6), attributes=(1, 0, NAN, NAN, 0.3, 2)),
        row([other + words(7), bad], (0, 1)),
        row([best, good], (0, 0), attributes=(NAN, NAN, NAN, 0.2, 0.4, 0.6)),
        row([asked + words(8), asked + words(8)], (0, 1), target=0.2),
        row([other + words(4), other + words(6)], (-1, -1), attributes=(NAN, 2.5, 1.0, -1.0, NAN, NAN)),
    ]


ROWS = made_rows()


def test_value_and_gradients_are_the_formula_s() -> None:
    """Of the hidden states, the heads, their offsets, the gate and the bias, by central differences."""
    objective = Objective(center=0.05, attributes=("a", "b"), attribute_weight=WEIGHT)
    rows = [
        TokenizedRow.of([np.array([1, 2]), np.array([1, 3])], (0, 1), 0.3, attributes=(2, NAN, 1, -1)),
        TokenizedRow.of([np.array([1, 4])], (-1,), attributes=(0.5, 1.5)),
    ]
    rng = np.random.default_rng(5)
    start = {
        "hidden": rng.normal(size=(3, 4)),
        "weight": rng.normal(size=(2, 4)),
        "offset": rng.normal(size=2),
        "gate": rng.normal(size=2) / 4,
        "bias": rng.normal(size=1),
    }

    def by_formula(of: dict[str, Any]) -> float:
        gates = [math.exp(math.sqrt(4) * u) for u in of["gate"]]
        mixed = [sum(g / sum(gates) * of["weight"][a][j] for a, g in enumerate(gates)) for j in range(4)]
        score = [sum(w * x for w, x in zip(mixed, h, strict=True)) + of["bias"][0] for h in of["hidden"]]

        def error(n: int, a: int, rating: float) -> float:
            foretold = sum(w * x for w, x in zip(of["weight"][a], of["hidden"][n], strict=True))
            return float((foretold + of["offset"][a] - rating) ** 2)

        compared = math.log(1 + math.exp(-(score[0] - score[1] - 0.3))) + 0.05 * (score[0] + score[1]) ** 2
        first = (error(0, 0, 2) + error(1, 0, 1) + error(1, 1, -1)) / 3
        return float(compared + WEIGHT * (first + (error(2, 0, 0.5) + error(2, 1, 1.5)) / 2))

    head = AttributeHead(
        objective.attributes, torch.from_numpy(start["weight"]), torch.from_numpy(start["bias"])
    )
    hidden = torch.from_numpy(start["hidden"]).requires_grad_(True)
    with torch.no_grad():
        head.offset.copy_(torch.from_numpy(start["offset"]))
        head.gate.copy_(torch.from_numpy(start["gate"]))

    def tensor(array: Any) -> torch.Tensor:
        made = torch.from_numpy(np.asarray(array))
        return made.double() if made.is_floating_point() else made

    terms = DeviceTerms(**tensors_of(pack_rows(rows, None, objective=objective), tensor))
    loss = row_losses(head(hidden), terms, objective).sum()
    loss.backward()
    # Margins and weights are float32 in a batch.
    assert loss.item() == pytest.approx(by_formula(start), rel=1e-7)
    for name, parameter in {"hidden": hidden, **dict(head.named_parameters())}.items():
        assert parameter.grad is not None
        for place in np.ndindex(*start[name].shape):
            slopes = []
            for step in (1e-5, -1e-5):
                moved = copy.deepcopy(start)
                moved[name][place] += step
                slopes.append(by_formula(moved))
            slope = (slopes[0] - slopes[1]) / 2e-5
            assert parameter.grad[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-6), (name, place)


def heads_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The heads that a run of these settings begins with."""
    give_attributes(model, RewardConfig(attributes=NAMES), None)
    head = attribute_head_of(model)
    assert head is not None
    return dict(head.named_parameters())


@functools.cache
def reference() -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients; each sequence alone through the stock body, each term written."""
    model = tiny_model(seed=1)
    heads = heads_of(model)
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        scores, foretold = [], []
        for ids in row.sequences:
            hidden = model.model(input_ids=torch.tensor(ids[None]).long()).last_hidden_state[0, -1]
            gates = torch.softmax(heads["gate"] * math.sqrt(32), 0)
            scores.append(sum(g * (w @ hidden) for g, w in zip(gates, heads["weight"], strict=True)).double())
            foretold += (heads["weight"] @ hidden + heads["offset"]).double().unbind()
        total = total + loss_of(row, scores, foretold)
    mean = total / len(ROWS)
    mean.backward()
    named = {**dict(model.named_parameters()), **heads}
    gradients = {key: p.grad.double() for key, p in named.items() if p.grad is not None}
    assert "score.weight" not in gradients
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return mean.item(), norm.item(), gradients


def loss_of(row: TokenizedRow, scores: list[torch.Tensor], foretold: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    compared = []
    for i, above in enumerate(row.ranks):
        for j, below in enumerate(row.ranks):
            if above < 0 or (above, i) >= (below, j):
                continue
            first, second = torch.exp(scores[i]), torch.exp(scores[j])
            both = torch.sqrt(first * second)
            win, lose, tie = (part / (first + second + both) for part in (first, second, both))
            likely = -row.target * torch.log(win) - (1 - row.target) * torch.log(lose)
            compared.append(
                (-torch.log(tie) if above == below else likely) + CENTER * (scores[i] + scores[j]) ** 2
            )
    if compared:
        total = total + torch.stack(compared).mean()
    if row.ratings:
        total = total + torch.stack([(s - y) ** 2 for s, y in zip(scores, row.ratings, strict=True)]).mean()
    errors = [
        (p - y) ** 2 for p, y in zip(foretold, row.attributes or [NAN] * len(foretold), strict=True) if y == y
    ]
    return total + WEIGHT * torch.stack(errors).mean() if errors else total


def variants() -> list[Variant]:
    one_row = max(len(row.ids) for row in ROWS)
    half = {"per_device_train_batch_size": 4}
    found = [
        Variant("shared"),
        Variant("one_row", max_tokens=one_row),
        Variant("padded", padded=True),
        Variant("accumulated", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
        Variant("checkpointed", {"gradient_checkpointing": True}),
        Variant("weighted_twice", {"attribute_weight": 2 * WEIGHT}),
        Variant("two_ranks_one_row", half, max_tokens=one_row, num_ranks=2),
        *(
            Variant(f"two_ranks_zero{stage}", {**half, "zero_stage": stage}, num_ranks=2)
            for stage in (0, 1, 2, 3)
        ),
        Variant("rows_in_parts", {"sequence_parallel_size": 2}, num_ranks=2),
        Variant("rows_in_parts_zero3", {"sequence_parallel_size": 2, "zero_stage": 3}, num_ranks=2),
    ]
    return [replace(one, settings={**PROBE, **one.settings}) for one in found]


RIGHT = [one.name for one in variants() if one.name != "weighted_twice"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attributes")
    run_variants(variants(), root, ROWS)
    return root


def differences(directory: Path) -> list[str]:
    """Where a run is not the reference's, in words."""
    loss, norm, gradients = reference()
    outcome, model = outcome_of(directory), tiny_model(seed=1)
    start = {**model.state_dict(), **heads_of(model)}
    after = {**outcome.weights, **load_file(directory / HEADS_FILE)}
    found = []
    if not abs(outcome.losses[0] - loss) <= TOLERANCE * loss:
        found.append(f"the loss is {outcome.losses[0]}, not {loss}")
    if not abs(outcome.norms[0] - norm) <= TOLERANCE * norm:
        found.append(f"the gradient norm is {outcome.norms[0]}, not {norm}")
    for key, wanted in gradients.items():
        gradient = (start[key].detach().double() - after[key].double()) / HUGE
        off = float((gradient - wanted).norm() / wanted.norm())
        if not off <= TOLERANCE:
            found.append(f"{key} differs by {off:.2e}")
    return found


@pytest.mark.parametrize("run", RIGHT)
def test_loss_and_gradients_are_those_of_the_written_terms(runs: Path, run: str) -> None:
    assert differences(runs / run) == []


def test_the_comparison_sees_ratings_that_weigh_twice(runs: Path) -> None:
    found = " ".join(differences(runs / "weighted_twice"))
    assert all(name in found for name in ("loss", "weight", "offset", "gate", "embed_tokens"))


@pytest.mark.parametrize("run", RIGHT)
def test_what_is_saved_is_the_heads_mean_under_the_gate(runs: Path, run: str) -> None:
    heads, saved = load_file(runs / run / HEADS_FILE), outcome_of(runs / run).weights
    assert heads["weight"].shape == (3, 32)
    gates = torch.softmax(heads["gate"].double() * math.sqrt(32), 0)
    assert gates.std() > 0.01
    folded = (gates @ heads["weight"].double())[None]
    torch.testing.assert_close(
        saved["score.weight"].double(), folded, rtol=1e-6, atol=1e-6 * folded.abs().max().item()
    )
    assert not [name for name in saved if "attribute" in name]


TRAINED: dict[str, Any] = {
    **SETTINGS,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
}


def trained(directory: Path, variant: Variant) -> dict[str, float]:
    """The variant, evaluated on its rows after its last step; the evaluation's record."""
    job = replace(job_of(variant, directory, ROWS), eval_sets={"": TokenizedSet.from_rows(ROWS)})
    train_rank(job, lambda record: None)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = next(record for record in reversed(records) if "eval_loss" in record)
    return found


def stock_scores(model: Any) -> list[float]:
    with torch.no_grad():
        return [
            model.eval()(input_ids=torch.tensor(ids[None]).long()).logits[0, 0].item()
            for row in ROWS
            for ids in row.sequences
        ]


@pytest.mark.parametrize("padded", [False, True])
def test_the_saved_model_is_a_stock_classifier_that_scores_as_training_did(
    tmp_path: Path, padded: bool
) -> None:
    told = trained(tmp_path / "run", Variant("run", TRAINED, padded=padded))
    rows = TokenizedSet.from_rows(ROWS)
    objective = Objective.of(RewardConfig(**SETTINGS, center_rewards_coefficient=CENTER))
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-6"):
        model = AutoModelForSequenceClassification.from_pretrained(directory)
        assert model.config.num_labels == 1
        scores = stock_scores(model)
        plain = evaluate_scores(scores, rows.index, objective)
        for name in ("mean_reward", "min_reward", "max_reward", "margin", "mse"):
            assert told[f"eval_{name}"] == pytest.approx(plain[name], abs=1e-6), name
        # With the heads that lie beside it the model also foretells ratings, as it did in training.
        reopen_attributes(model, directory)
        outputs = score_model(model, rows, RewardConfig(bf16=False, use_cpu=True))
        assert outputs.shape == (len(scores), 4)
        np.testing.assert_allclose(outputs[:, 0], scores, rtol=0, atol=1e-6)
        found = evaluate_scores(outputs, rows.index, objective)
        for name in ("loss", *(f"attribute_mse_{name}" for name in NAMES)):
            assert told[f"eval_{name}"] == pytest.approx(found[name], rel=1e-5), name
        assert stock_scores(model) == pytest.approx(scores, abs=1e-6)


def test_a_saved_model_is_evaluated_by_the_weight_of_its_ratings(tmp_path: Path) -> None:
    told = trained(tmp_path, Variant("run", TRAINED))
    loaded, rows = load_saved(tmp_path, device="cpu"), TokenizedSet.from_rows(ROWS)
    reopen_attributes(loaded.model, tmp_path)
    outputs = score_model(loaded.model, rows, RewardConfig(bf16=False, use_cpu=True))
    objective = objective_of(loaded, {})
    assert evaluate_scores(outputs, rows.index, objective)["loss"] == pytest.approx(
        told["eval_loss"], rel=1e-5
    )


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run_variants(
        [Variant("whole", TRAINED), Variant("resumed", {**TRAINED, "save_total_limit": 9}, stop_in=4)],
        tmp_path,
        ROWS,
    )
    whole, resumed = outcome_of(tmp_path / "whole"), outcome_of(tmp_path / "resumed")
    assert whole.losses.tolist() == resumed.losses.tolist()
    assert whole.norms.tolist() == resumed.norms.tolist()
    heads = [load_file(tmp_path / name / HEADS_FILE) for name in ("whole", "resumed")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


@pytest.mark.parametrize("stage", [None, 3])
def test_an_adapter_is_saved_with_the_heads_and_their_reward(tmp_path: Path, stage: int | None) -> None:
    base = tmp_path / "base"
    tiny_model(seed=1).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = {**TRAINED, "zero_stage": stage}
    told = trained(tmp_path / "run", Variant("run", settings, lora=True, loaded=base))
    saved = outcome_of(tmp_path / "run").weights
    (name,) = [name for name in saved if "score" in name]
    assert saved[name].shape == (1, 32)
    rows = TokenizedSet.from_rows(ROWS)
    loaded = load_saved(tmp_path / "run", device="cpu")
    objective = Objective.of(RewardConfig(**SETTINGS))
    plain = evaluate_scores(stock_scores(loaded.model), rows.index, objective)
    for metric in ("mean_reward", "min_reward", "max_reward", "mse"):
        # Merging adds the adapter to the weights, which rounds.
        assert told[f"eval_{metric}"] == pytest.approx(plain[metric], abs=1e-5), metric
    reopen_attributes(loaded.model, tmp_path / "run")
    outputs = score_model(loaded.model, rows, RewardConfig(bf16=False, use_cpu=True))
    found = evaluate_scores(outputs, rows.index, objective)
    for attribute in NAMES:
        key = f"attribute_mse_{attribute}"
        assert told[f"eval_{key}"] == pytest.approx(found[key], rel=1e-4)


def test_training_goes_on_from_a_saved_model_and_its_heads(tmp_path: Path) -> None:
    first = trained(tmp_path / "first", Variant("first", TRAINED))
    again = {**TRAINED, "eval_on_start": True}
    trained(tmp_path / "again", Variant("again", again, loaded=tmp_path / "first"))
    lines = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    start = next(record for record in map(json.loads, lines) if "eval_loss" in record)
    for name in ("loss", "mean_reward", *(f"attribute_mse_{name}" for name in NAMES)):
        assert start[f"eval_{name}"] == pytest.approx(first[f"eval_{name}"], rel=1e-5), name


def planted(count: int, seed: int, decides: int) -> list[TokenizedRow]:
    """Answers of eleven words, some of two kinds: both are rated by how many there are, and one decides.

    Of the kind that decides the preferred answer has more; of the other as many by chance.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        sides = []
        for deciding in rng.choice(6, 2, replace=False).tolist():
            other = int(rng.integers(0, 5))
            words = [11 + decides] * deciding + [12 - decides] * other + [13] * (11 - deciding - other)
            numbers = (deciding, other) if decides == 0 else (other, deciding)
            sides.append((deciding, numbers, [10, *rng.permutation(words).tolist()]))
        sides.sort(key=lambda side: -side[0])
        attributes = [number / 2 for _, numbers, _ in sides for number in numbers]
        sequences = [np.array(ids, np.int32) for *_, ids in sides]
        rows.append(TokenizedRow.of(sequences, (0, 1), attributes=attributes))
    return rows


@pytest.mark.parametrize("decides", [0, 1])
def test_planted_attributes_are_found_and_the_gate_goes_to_the_one_that_decides(
    tmp_path: Path, decides: int
) -> None:
    settings = {
        "attributes": ["first", "second"],
        "max_steps": 60,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "center_rewards_coefficient": None,
        "eval_strategy": "steps",
        "eval_steps": 60,
        "logging_steps": 5,
    }
    job = job_of(Variant("run", settings), tmp_path / "run", planted(400, 1, decides))
    train_rank(
        replace(job, eval_sets={"": TokenizedSet.from_rows(planted(100, 2, decides))}), lambda record: None
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(record for record in reversed(records) if "eval_loss" in record)
    assert found["eval_attribute_pearson_first"] > 0.85
    assert found["eval_attribute_pearson_second"] > 0.85
    assert found["eval_accuracy"] > 0.9
    name = ("gate_first", "gate_second")[decides]
    gates = [record[name] for record in records if name in record]
    assert len(gates) == 12
    assert gates[0] < 0.75 < gates[-1]
