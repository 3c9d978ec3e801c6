"""A reward model here reads text alone: one that also reads images, sound or pages is refused by its config.

Rows hold no images, so that such a model would be trained, and its vision tower saved, without seeing one:
what it scored with images afterwards would have been learnt from nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rayrm.errors import ModelError

_SENSES = {"vision": "images", "image": "images", "video": "videos", "audio": "sound", "speech": "sound"}
_CLASSIFIER = "AutoModelForSequenceClassification"


def check_text_only(name: str, config: Any) -> None:
    """Raise ModelError for a model of more than text, with what to train instead."""
    parts = list(_parts(config))
    if hasattr(config, "max_2d_position_embeddings"):
        raise ModelError(
            f"model `{name}` ({config.model_type}) also reads where words stand on a page, and only text can "
            "be scored. Take a text model, such as the one that it grew from."
        )
    if not parts:
        return
    sense = next(sense for word, sense in _SENSES.items() if word in parts[0].rpartition(".")[2])
    alone = _language_model(config)
    raise ModelError(
        f"model `{name}` ({config.model_type}) also reads {sense} (`{parts[0]}`), and only text can be "
        f"scored: rows have no {sense}, so that its scores of them would be learnt from nothing. "
        + (
            f"Take its language model alone: `AutoModel.from_pretrained({name!r}).{alone}"
            ".save_pretrained(DIRECTORY)`, with its tokenizer beside it."
            if alone is not None
            else "Take a text model."
        )
    )


def _parts(config: Any, within: str = "") -> Iterator[str]:
    """The names of what a model has for other than text, also in a part of it: "encoder.vision_config"."""
    for name in getattr(config, "sub_configs", None) or ():
        if any(word in name for word in _SENSES):
            yield within + name
        else:
            yield from _parts(getattr(config, name, None), f"{within}{name}.")


def _language_model(config: Any) -> str | None:
    """Which attribute of the whole model is a text model that could be trained; None where there is none."""
    try:
        text = config.get_text_config()
        if type(text) is type(config) or type(text) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return None
        with torch.device("meta"), torch.random.fork_rng([]):
            whole = AutoModel.from_config(config)
    except (ValueError, ImportError):
        return None  # of several texts, of no model's kind, or of a package that is not here: no advice
    models = ((name, part) for name, part in whole.named_modules() if isinstance(part, PreTrainedModel))
    return next((name for name, part in models if name and type(part.config) is type(text)), None)


def check_classifies(name: str, config: Any) -> None:
    """Raise ModelError for a kind of model that transformers has no sequence classifier of."""
    if _CLASSIFIER in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"model `{name}`: transformers has no sequence classifier of its kind (`{config.model_type}`), "
            f"and a reward model is an `{_CLASSIFIER}` with one label. Take a model of another family."
        )
