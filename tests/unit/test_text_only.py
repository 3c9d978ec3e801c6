"""Models of more than text, and processors, are refused by name, with what to train instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Gemma3Config,
    LayoutLMConfig,
    MusicgenConfig,
    PreTrainedConfig,
    Qwen2AudioConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
    T5Gemma2Config,
    WhisperConfig,
)

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, ModelError
from rayrm.model.reward_model import check_name, load_model
from rayrm.train.build import ModelSource, check_source
from rayrm.train.given import tokenizer_of
from tests.tiny import tiny_model, tiny_tokenizer

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MUSIC = {
    "text_encoder": {"model_type": "t5", "d_model": 16, "num_layers": 1},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": SMALL,
}
# Which attribute of the whole model its text model is differs by family.
WHOLE: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "gemma3": (Gemma3Config(text_config=TEXT, vision_config=VISION), "language_model", "gemma3_text"),
    "smolvlm": (
        SmolVLMConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "patch_size": 14},
            scale_factor=1,
            image_token_id=3,
        ),
        "text_model",
        "llama",
    ),
}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gemma3": (Gemma3Config(text_config=TEXT, vision_config=VISION), r"reads images \(`vision_config`\)"),
    # In a part of it, and transformers has a classifier of it.
    "t5gemma2": (T5Gemma2Config(), r"reads images \(`encoder.vision_config`\), .* Take a text model"),
    # Which of its texts is meant nobody can say.
    "musicgen": (MusicgenConfig(**MUSIC), r"reads sound \(`audio_encoder`\), .* Take a text model"),
    "qwen2_vl": (Qwen2VLConfig(), r"reads images \(`vision_config`\), .* Take a text model"),
    "qwen2_audio": (Qwen2AudioConfig(), r"reads sound \(`audio_config`\)"),
    "layoutlm": (LayoutLMConfig(), "where words stand on a page"),
    "whisper": (WhisperConfig(), r"no sequence classifier of its kind \(`whisper`\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_of_more_than_text_is_refused_by_its_config(kind: str, tmp_path: Path) -> None:
    config, says = REFUSED[kind]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"`{tmp_path}`.*{says}"):
        check_name(str(tmp_path), {})
    with pytest.raises(ModelError, match=says):
        check_source(ModelSource(str(tmp_path)), RewardConfig())


def test_a_model_object_that_reads_images_is_refused_too() -> None:
    config = REFUSED["gemma3"][0]
    config.num_labels = 1
    model: Any = AutoModelForSequenceClassification.from_config(config)
    assert type(model).__name__ == "Gemma3ForSequenceClassification"  # transformers would train it
    with pytest.raises(ModelError, match="reads images"):
        check_source(ModelSource(model), RewardConfig())


@pytest.mark.parametrize("family", WHOLE)
def test_what_the_refusal_says_to_type_gives_a_text_model(family: str, tmp_path: Path) -> None:
    config, attribute, kind = WHOLE[family]
    name, text = str(tmp_path / "both"), str(tmp_path / "text")
    AutoModel.from_config(config).save_pretrained(name)
    with pytest.raises(ModelError) as refusal:
        check_name(name, {})
    (code,) = [part for part in str(refusal.value).split("`") if part.startswith("AutoModel.")]
    assert f".{attribute}.save_pretrained" in code
    exec(code, {"AutoModel": AutoModel, "DIRECTORY": text})
    assert AutoConfig.from_pretrained(text).model_type == kind
    assert "ForSequenceClassification" in type(load_model(text)).__name__


def test_a_processor_is_refused_with_its_tokenizer_named() -> None:
    class Processor:
        tokenizer = tiny_tokenizer()

    with pytest.raises(ConfigError, match=r"`processing_class` is a Processor.*`processor.tokenizer`"):
        tokenizer_of(Processor(), ModelSource(tiny_model()), RewardConfig())
