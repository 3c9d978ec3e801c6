"""A reward model here reads text alone: one that also reads images, sound or pages is refused by its config.

Rows hold no images, so that such a model would be trained, and its vision tower saved, without seeing one:
what it scored with images afterwards would have been learnt from nothing.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rayrm.errors import ModelError

_SENSES = {"vision": "images", "image": "images", "video": "videos", "audio": "sound", "speech": "sound"}
_CLASSIFIER = "AutoModelForSequenceClassification"


def check_text_only(name: str, config: Any) -> None:
    """Raise ModelError for a model of more than text, with what to train instead."""
    parts = [part for part in getattr(config, "sub_configs", ()) if any(word in part for word in _SENSES)]
    if hasattr(config, "max_2d_position_embeddings"):
        raise ModelError(
            f"model `{name}` ({config.model_type}) also reads where words stand on a page, and only text can "
            "be scored. Take a text model, such as the one that it grew from."
        )
    if not parts:
        return
    sense = next(sense for word, sense in _SENSES.items() if word in parts[0])
    text = config.get_text_config()
    alone = type(text) is not type(config) and type(text) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    raise ModelError(
        f"model `{name}` ({config.model_type}) also reads {sense} (`{parts[0]}`), and only text can be "
        f"scored: rows have no {sense}, so that its scores of them would be learnt from nothing. "
        + (
            f"Take its language model alone: `AutoModel.from_pretrained({name!r}).language_model"
            ".save_pretrained(DIRECTORY)`, with its tokenizer beside it."
            if alone
            else "Take a text model."
        )
    )


def check_classifies(name: str, config: Any) -> None:
    """Raise ModelError for a kind of model that transformers has no sequence classifier of."""
    if _CLASSIFIER in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"model `{name}`: transformers has no sequence classifier of its kind (`{config.model_type}`), "
            f"and a reward model is an `{_CLASSIFIER}` with one label. Take a model of another family."
        )
