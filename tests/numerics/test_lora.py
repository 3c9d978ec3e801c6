"""Law 1 with an adapter: recomputed layers, shared prefixes and shards give the padded run's trajectory.

Under ZeRO-3 an adapted layer is recomputed reentrantly unless the user says otherwise, as here, with every
weight gathered for each use. The stages of ZeRO by default are in `test_zero_matrix.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.numerics.ranks import GATHERED, NUM_STEPS, Variant, outcome_of, run_variants
from tests.numerics.test_same_gradients import OPTIMIZERS, TOLERANCE, differences

CHECKPOINTED = {"gradient_checkpointing": True}
NOT_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
REFERENCE = Variant("reference", padded=True)
FORMS = [
    Variant("shared"),
    Variant("checkpointed", CHECKPOINTED),
    Variant("padded_checkpointed", CHECKPOINTED, padded=True),
    Variant("two_ranks_checkpointed", CHECKPOINTED, num_ranks=2),
    Variant("two_ranks_gathered_checkpointed", {**CHECKPOINTED, **GATHERED, **NOT_REENTRANT}, num_ranks=2),
    # The budget's probe runs before the engine, through the same recomputation.
    Variant("two_ranks_zero3_chosen", {**CHECKPOINTED, "zero_stage": 3}, num_ranks=2, max_tokens=None),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    # SGD without clipping: AdamW would hide a gradient that is wrong by a factor.
    settings = OPTIMIZERS["sgd"]
    variants = [replace(form, settings={**settings, **form.settings}) for form in [REFERENCE, *FORMS]]
    run_variants([replace(variant, lora=True) for variant in variants], root)
    return root


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_every_form_of_an_adapted_run_has_the_reference_trajectory(runs: Path, form: str) -> None:
    outcome, reference = outcome_of(runs / form), outcome_of(runs / "reference")
    assert len(outcome.losses) == NUM_STEPS
    assert differences(outcome, reference) == []
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        # `lora_B` starts at zero: what it holds is the sum of its gradients.
        off = float((outcome.weights[name] - weight).norm() / weight.norm())
        assert off <= TOLERANCE, f"{name} differs by {off:.2e} of itself"


def test_the_adapter_learns(runs: Path) -> None:
    weights = outcome_of(runs / "reference").weights
    # Both start at zero; without gradients from the layers above, the first layer's would stay there.
    moved = [float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name]
    assert len(moved) == 14  # seven projections of two layers
    assert min(moved) > 0
