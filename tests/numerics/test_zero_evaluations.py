"""Under ZeRO-3 evaluations and checkpoints between the steps change none of them.

A forward pass without a backward pass leaves DeepSpeed with weights that are on their way; what is trained,
saved or gone on from afterwards must be whole.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cells import cells_of
from tests.numerics.ranks import GATHERED, Variant, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import differences, untimed
from tests.tiny import save_tiny

EACH = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
FORMS: dict[str, dict[str, Any]] = {
    "by_size": {"settings": {"zero_stage": 3}},
    "gathered": {"settings": GATHERED},
    "recomputed": {"settings": {"zero_stage": 3, "gradient_checkpointing": True}},
    "lora": {"settings": {"zero_stage": 3}, "lora": True},
    "in_parts": {"settings": {"zero_stage": 3, "zero_init": True}},
}


@pytest.mark.parametrize("form", cells_of(FORMS, ["by_size", "lora"]))
def test_a_run_that_evaluates_and_saves_after_each_step_is_one_that_does_not(
    tmp_path: Path, form: str
) -> None:
    base = save_tiny(tmp_path / "base", seed=1)
    settings = FORMS[form].get("settings", {})
    of_form = {"lora": FORMS[form].get("lora", False), "loaded": base}
    plain = Variant("plain", {"max_steps": 4}, **of_form)
    evaluated = Variant(
        "evaluated", {**settings, **EACH, "max_steps": 4}, num_ranks=2, evaluates=True, **of_form
    )
    again = replace(evaluated, name="again", stop_in=3)
    run_variants([plain, evaluated, again], tmp_path, tokenized(12))
    outcome = outcome_of(tmp_path / "evaluated")
    assert differences(outcome, outcome_of(tmp_path / "plain")) == []
    assert untimed(tmp_path / "evaluated") == untimed(tmp_path / "again")
    records = [
        json.loads(line) for line in (tmp_path / "evaluated" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "eval_loss" in record] == [1, 2, 3, 4]
    resumed = outcome_of(tmp_path / "again").weights
    assert all(torch.equal(weight, resumed[name]) for name, weight in outcome.weights.items())
