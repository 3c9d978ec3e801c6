"""Save reward models in transformers' files, with what they add: `rayrm.json`, a card, heads by attribute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from rayrm.model.adapters import ADAPTER_CONFIG, save_adapter
from rayrm.model.attention import restore_attention
from rayrm.model.attribute_head import HEADS_FILE, AttributeWeights, attribute_head_of
from rayrm.model.card import CARD, TAGS, move_card, shown, write_card
from rayrm.model.layout import unwrapped
from rayrm.model.quantization import is_quantized

FACTS = "rayrm.json"
TextForm = Literal["standard", "conversational"]
_SAVED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    HEADS_FILE,
    FACTS,
    CARD,
    "card-*.svg",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' load report: a new head and a dropped LM head are what a reward model is."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def add_tags(model: torch.nn.Module) -> None:
    """Tag the model as what it becomes; transformers writes the tags where it writes a card."""
    add = getattr(unwrapped(model), "add_model_tags", None)
    if add is not None:
        add(list(TAGS))


def save_model(
    model: torch.nn.Module,
    tokenizer: Any,
    directory: Path,
    *,
    text_form: TextForm,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    attributes: AttributeWeights | None = None,
    objective: Mapping[str, Any] | None = None,
    place: Path | None = None,
) -> None:
    """Save model and tokenizer as transformers does (PEFT: the adapter), plus `rayrm.json`.

    `state_dict` replaces the model's own where its parameters are sharded; so does `attributes` what is
    beside the model. `objective`: the settings of what it was trained on (`Objective.settings`), which its
    evaluation reads. `place`: where `directory` will lie when it is whole, for the card; None: it does.
    """
    inner = unwrapped(model)
    if attributes is None and (head := attribute_head_of(inner)) is not None:
        attributes = AttributeWeights(head.names, head.copies(), {})
    implementation = inner.config._attn_implementation
    restore_attention(inner)
    # Says that the logit is the result: servers such as vLLM then apply no sigmoid to it.
    inner.config.problem_type = "regression"
    add_tags(inner)
    try:
        with quiet_transformers():
            if hasattr(model, "get_base_model"):
                save_adapter(model, directory, state_dict=state_dict)
            else:
                model.save_pretrained(str(directory), state_dict=state_dict)  # type: ignore[operator]
    finally:
        inner.config._attn_implementation = implementation
    tokenizer.save_pretrained(str(directory))
    facts: dict[str, Any] = {
        "format": 1,
        "text_form": text_form,
        "pad_token_id": inner.config.get_text_config().pad_token_id,
    }
    if is_quantized(inner):
        facts["quantization"] = inner.config.quantization_config.to_dict()
    if objective:
        facts["objective"] = dict(objective)
    (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    (directory / HEADS_FILE).unlink(missing_ok=True)
    if attributes is not None:
        attributes.save(directory)
    base = inner.config._name_or_path
    write_card(
        directory,
        place=place or directory.absolute(),
        base_model=None if not base or Path(base).is_absolute() or Path(base).is_dir() else base,
        is_adapter=(directory / ADAPTER_CONFIG).exists(),
        text_form=text_form,
        is_quantized=is_quantized(inner),
    )


def _brings_code(directory: Path) -> bool:
    """Whether the model or its tokenizer is made by Python code beside it (`trust_remote_code`)."""
    files = (directory / "config.json", directory / "tokenizer_config.json")
    return any(file.exists() and "auto_map" in json.loads(file.read_text()) for file in files)


def copy_saved(source: Path, target: Path, place: Path | None = None) -> None:
    """Copy the files that `save_model` wrote in `source`, and nothing else that lies beside them.

    `place`: where the copy will lie, for its card; None: it does.
    """
    if source.resolve() == target.resolve():
        return
    patterns = (*_SAVED, *(("*.py",) if _brings_code(source) else ()))
    files = [file for pattern in patterns for file in source.glob(pattern)]
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy2(file, copy)
    weights = {file.name for file in files if file.match("model*.safetensors*")}
    for old in target.glob("model*.safetensors*"):
        if weights and old.name not in weights:  # of an earlier save; it might be loaded instead
            old.unlink()
    if (target / CARD).exists():
        move_card(target, shown(source.absolute()), shown((place or target).absolute()))
