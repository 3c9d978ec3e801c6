"""What a reward head is made of, in each family, and which weights a checkpoint may lack or bring."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel

from rayrm.errors import ModelError
from rayrm.model.head import head_parts
from rayrm.model.reward_model import load_model
from tests.families import FAMILIES, save_base

PARTS = {
    "bert": ["classifier", "pooler"],
    "roberta": ["classifier"],
    "deberta_v2": ["pooler", "classifier"],
    "modernbert": ["head", "classifier"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_all_that_stands_between_the_base_model_and_the_score(family: str) -> None:
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family])
    assert head_parts(model) == PARTS.get(family, ["score"])
    assert head_parts(BertModel(FAMILIES["bert"])) == []


def rewritten(directory: Path, *, drop: str = "", add: str = "") -> str:
    """The model's directory, without some weights or with one more."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    kept = {name: weight for name, weight in weights.items() if not drop or drop not in name}
    assert bool(drop) == (len(kept) < len(weights))
    if add:
        kept[add] = next(iter(weights.values())).clone()
    save_file(kept, file, {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("family", ["bert", "deberta_v2", "modernbert"])
def test_of_an_encoder_too_only_the_head_may_be_missing(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path, saved_as="body")
    load_model(str(base))
    with pytest.raises(ModelError, match=r"lacks weights that are not the reward head: .*layers?.1"):
        load_model(rewritten(base, drop="1."))


@pytest.mark.parametrize(("add", "told"), [("v_head.summary.weight", True), ("lm_head.bias", False)])
def test_another_head_that_is_dropped_is_told_unless_it_predicts_tokens(
    add: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(rewritten(save_base("llama", tmp_path, saved_as="body"), add=add))
    assert (f"no use for: {add}" in caplog.text) == told
