"""Which layout a model may take, read off its class and config; every fallback says why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rayrm.model.layout import Layout, active_dropout, choose_layout, disable_dropout

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_labels": 1,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SHARED = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral_without_window": MistralConfig(**SHAPE, sliding_window=None),
    "mistral_window_as_long_as_its_positions": MistralConfig(**SHAPE, sliding_window=128),
    "phi3": Phi3Config(**SHAPE, sliding_window=None),
}
PADDED = {
    "mistral": (MistralConfig(**SHAPE, sliding_window=16), r"sliding window \(16\).*longest row \(128\)"),
    "qwen2_window": (
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        r"sliding window \(16\)",
    ),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=8, sliding_window=128), "soft-capped"),
    "gpt_oss": (GptOssConfig(**SHAPE, head_dim=8, num_local_experts=2), "no plain softmax attention"),
    "longrope": (
        Phi3Config(**SHAPE, sliding_window=None, rope_parameters=LONGROPE),
        "longrope.*longest position",
    ),
    "gpt2": (GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, num_labels=1), "GPT2"),
    "opt": (
        OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60),
        "OPT",
    ),
    "bert": (
        BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
        ),
        "Bert",
    ),
}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    disable_dropout(model)
    return model


@pytest.mark.parametrize("family", SHARED)
def test_a_causal_decoder_with_plain_attention_shares_prefixes(family: str) -> None:
    assert choose_layout(model_of(SHARED[family])) == Layout("shared")


@pytest.mark.parametrize("family", SHARED)
def test_sharing_can_be_turned_off(family: str) -> None:
    layout = choose_layout(model_of(SHARED[family]), share_prefix=False)
    assert layout == Layout("packed", "`share_prefix` is False")


@pytest.mark.parametrize("family", PADDED)
def test_any_other_model_is_padded_and_says_why(family: str) -> None:
    config, reason = PADDED[family]
    layout = choose_layout(model_of(config))
    assert layout.name == "padded"
    assert re.search(reason, layout.reason), layout.reason


def test_a_window_longer_than_every_row_is_no_window() -> None:
    model = model_of(PADDED["mistral"][0])
    assert choose_layout(model, longest=16).name == "shared"
    assert choose_layout(model, longest=17).name == "padded"


def test_dropout_matters_in_training_only() -> None:
    config = LlamaConfig(**SHAPE, attention_dropout=0.1)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    assert choose_layout(model, train=False).name == "shared"
    layout = choose_layout(model, train=True)
    assert layout.name == "padded"
    assert "dropout is active (config.attention_dropout)" in layout.reason
    disable_dropout(model)
    assert choose_layout(model, train=True).name == "shared"


def test_disabling_dropout_reaches_modules_config_and_copied_attributes() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
    )
    bert = AutoModelForSequenceClassification.from_config(config).train()
    assert active_dropout(bert) is not None
    disable_dropout(bert)
    assert active_dropout(bert) is None
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(bert(input_ids=tokens).logits, bert(input_ids=tokens).logits)


def test_an_adapter_with_dropout_is_seen_through_its_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model_of(SHARED["llama"]), lora)
    assert choose_layout(model, train=True).name == "padded"
    assert choose_layout(model, train=False).name == "shared"
