"""A model that two ranks load in parts trains as one that each of them loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from tests.numerics.ranks import GATHERED, Outcome, Variant, outcome_of, run_variants
from tests.tiny import tiny_llama_config, tiny_model

NUM_STEPS = 6


def save_base(directory: Path, **shape: Any) -> Path:
    """A model without a head."""
    torch.manual_seed(4)
    AutoModel.from_config(tiny_llama_config(**shape)).save_pretrained(directory)
    return directory


def variants(root: Path) -> list[Variant]:
    base = save_base(root / "base")
    short = save_base(root / "short", vocab_size=390)
    tiny_model(seed=5).save_pretrained(root / "reward")
    made = []
    for loaded, lora in ((base, False), (short, False), (root / "reward", False), (base, True)):
        for parts in (False, True):
            name = f"{loaded.name}{'-lora' if lora else ''}-{'parts' if parts else 'whole'}"
            settings = {**GATHERED, "zero_init": parts, "max_steps": NUM_STEPS}
            made.append(Variant(name, settings, num_ranks=2, loaded=loaded, lora=lora))
    # The budget that is not measured, layers that are computed again, and weights that stay whole.
    settings = {"zero_stage": 3, "zero_init": True, "gradient_checkpointing": True, "max_steps": NUM_STEPS}
    made.append(Variant("unmeasured-parts", settings, num_ranks=2, loaded=base, max_tokens=None))
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("zero_init")
    chosen = variants(root)
    run_variants(chosen, root)
    return {variant.name: outcome_of(root / variant.name) for variant in chosen}


@pytest.mark.parametrize("model", ["base", "short", "reward", "base-lora", "unmeasured"])
def test_losses_and_weights_are_those_of_a_model_loaded_whole(runs: dict[str, Outcome], model: str) -> None:
    parts, whole = runs[f"{model}-parts"], runs[f"{'base' if model == 'unmeasured' else model}-whole"]
    assert len(parts.losses) == NUM_STEPS
    torch.testing.assert_close(torch.tensor(parts.losses), torch.tensor(whole.losses), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(parts.norms), torch.tensor(whole.norms), rtol=1e-5, atol=0)
    assert parts.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, rtol=0, atol=1e-6, msg=name)
