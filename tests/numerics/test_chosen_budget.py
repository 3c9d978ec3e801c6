"""Law 4: a run that chooses its token budget has the bits of a run that is given the same one.

So the probe changes no weight, no gradient and no random state, whatever engine takes the model afterwards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.train.build import ModelSource
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Variant, job_of, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import untimed
from tests.tiny import tiny_model

CHECKPOINTED = {"gradient_checkpointing": True, "max_steps": 4}
# What a CPU chooses for so small a model on any machine that can run these tests.
CHOSEN = 8192


def forms() -> Sequence[Variant]:
    return [
        Variant("torch", CHECKPOINTED),
        Variant("stored", {**CHECKPOINTED, "gradient_checkpointing": False}),
        Variant("padded", CHECKPOINTED, padded=True),
        Variant("zero3", {**CHECKPOINTED, "zero_stage": 3}),
        Variant("two_ranks", CHECKPOINTED, num_ranks=2),
        Variant("two_ranks_zero3", {**CHECKPOINTED, "zero_stage": 3}, num_ranks=2),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    given = [replace(form, name=f"{form.name}_given", max_tokens=CHOSEN) for form in forms()]
    chosen = [replace(form, name=f"{form.name}_chosen", max_tokens=None) for form in forms()]
    run_variants([*given, *chosen], root)
    return root


@pytest.mark.parametrize("form", [form.name for form in forms()])
def test_a_chosen_budget_gives_the_bits_of_a_given_one(runs: Path, form: str) -> None:
    given, chosen = runs / f"{form}_given", runs / f"{form}_chosen"
    assert untimed(given) == untimed(chosen)
    one, two = outcome_of(given).weights, outcome_of(chosen).weights
    assert all(torch.equal(one[name], two[name]) for name in one)


def dropping_job(directory: Path, max_tokens: int | None) -> Any:
    """A run whose dropout draws from the random state at every step."""
    settings = {**CHECKPOINTED, "disable_dropout": False}
    job = job_of(Variant("dropout", settings, max_tokens=max_tokens), directory, tokenized())
    return replace(job, source=ModelSource(tiny_model(seed=1, attention_dropout=0.3)))


def test_the_probe_draws_no_random_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rayrm.train"):
        train_rank(dropping_job(tmp_path / "chosen", None), lambda record: None)
    said = re.search(r"max_tokens_per_microbatch: (\d+) tokens \(measured", caplog.text)
    assert said is not None
    assert int(said[1]) == CHOSEN
    train_rank(dropping_job(tmp_path / "given", CHOSEN), lambda record: None)
    assert untimed(tmp_path / "given") == untimed(tmp_path / "chosen")
