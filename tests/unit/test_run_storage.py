"""What of a finished run its store holds: by file://, which needs no service."""

from __future__ import annotations

from pathlib import Path

from rayrm.model.reward_model import load_saved
from rayrm.model.saving import save_model
from rayrm.train.storage import RunStorage
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer


def test_the_stored_model_has_all_of_its_templates(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ messages[0]['content'] }}"}
    save_model(tiny_model(), tokenizer, run, text_form="conversational")
    RunStorage(f"file://{tmp_path}/store", run, {}).keep_result()
    assert load_saved(tmp_path / "store" / "run").tokenizer.chat_template == tokenizer.chat_template
