"""The code on a saved model's card loads it in stock libraries, and gives our score."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard

from rayrm.model.adapters import add_adapter
from rayrm.model.saving import copy_saved, save_model
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ASK, ANSWER = "Why is the sky blue?", "Air scatters blue light most."


@pytest.mark.parametrize("text_form", ["conversational", "standard"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_its_code_gives_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_form: Any, adapted: bool
) -> None:
    model: Any = tiny_model(seed=1)
    if adapted:
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        model = add_adapter(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    (tmp_path / "saved").mkdir()
    save_model(model, tiny_tokenizer(), tmp_path / "saved", text_form=text_form)
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.tags == ["reward-trainer", "rayrm"]
    assert card.data.library_name == ("peft" if adapted else "transformers")
    assert card.data.base_model is None  # a directory is no name of the hub
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    ours = RewardModel.from_pretrained(tmp_path / "saved")
    if text_form == "conversational":
        said = [{"role": "user", "content": ASK}], [{"role": "assistant", "content": ANSWER}]
        (expected,) = ours.score([said[0]], [said[1]])
    else:
        (expected,) = ours.score([ASK], [f" {ANSWER}"])
    assert space["score"] == pytest.approx(expected, abs=1e-5)


def test_a_checkpoint_is_loaded_from_beside_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written aside, and then moved to where its card says it is."""
    aside, place = tmp_path / "first" / ".checkpoint-3.partial", tmp_path / "first" / "checkpoint-3"
    save_model(tiny_model(seed=1), tiny_tokenizer(), aside, text_form="standard", place=place)
    aside.rename(place)
    card = ModelCard.load(place / "README.md")
    assert card.text.strip().startswith("# first/checkpoint-3\n")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    (expected,) = RewardModel.from_pretrained(place).score([ASK], [f" {ANSWER}"])
    assert space["score"] == pytest.approx(expected, abs=1e-5)


def test_a_copy_is_loaded_by_its_own_name(tmp_path: Path) -> None:
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "run", text_form="standard")
    (tmp_path / "copy").mkdir()
    copy_saved(tmp_path / "run", tmp_path / "copy")
    said = (tmp_path / "copy" / "README.md").read_text()
    assert said.count('from_pretrained("copy"') == 2
    assert "\n# copy\n" in said
    assert said.replace("copy", "run") == (tmp_path / "run" / "README.md").read_text()


def test_a_name_of_the_hub_is_the_base(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    model = tiny_model()
    model.config._name_or_path = "org/model"
    (tmp_path / "saved").mkdir()
    save_model(model, tiny_tokenizer(), tmp_path / "saved", text_form="standard")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.base_model == "org/model"
