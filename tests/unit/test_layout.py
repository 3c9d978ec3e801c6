"""Which layout a model may take, read off its class and config; every fallback says why."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BioGptConfig,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    FlaubertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from rayrm.data.packing import pack_texts
from rayrm.errors import ConfigError
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import Layout, active_dropout, choose_layout, disable_dropout, plain_reach

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
LONG_PHI3 = Phi3Config(
    **SHAPE, sliding_window=None, rope_parameters=LONGROPE, original_max_position_embeddings=32
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MIXED = ["linear_attention", "full_attention"]
SHARED = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral_without_window": MistralConfig(**SHAPE, sliding_window=None),
    "mistral_window_as_long_as_its_positions": MistralConfig(**SHAPE, sliding_window=128),
    "phi3": Phi3Config(**SHAPE, sliding_window=None),
    "gemma3_window_as_long_as_its_positions": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=128),
    "gemma2_with_its_soft_cap": Gemma2Config(**SHAPE, head_dim=8, sliding_window=128),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "dynamic_rope_within_its_positions": LlamaConfig(**SHAPE, rope_parameters=DYNAMIC),
}
PADDED = {
    "mistral": (MistralConfig(**SHAPE, sliding_window=16), r"sliding window \(16\).*longest row \(128\)"),
    "qwen2_window": (
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        r"sliding window \(16\)",
    ),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=8, sliding_window=16), r"sliding window \(16\)"),
    "gpt_oss": (GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4), "GptOss.* has attention sinks"),
    "longrope": (LONG_PHI3, "longrope.*longest position"),
    "gemma3": (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16), r"sliding window \(16\)"),
    "gemma3_bidirectional": (
        Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=128, use_bidirectional_attention=True),
        "bidirectional",
    ),
    "gemma3_with_images": (
        Gemma3Config(
            text_config={name: value for name, value in SHAPE.items() if name != "num_labels"},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            num_labels=1,
        ),
        "Gemma3Model is more than a decoder",
    ),
    "minimax": (
        MiniMaxConfig(**SHAPE, head_dim=8, num_local_experts=2, layer_types=MIXED),
        "layers of kind linear_attention",
    ),
    "jamba": (
        JambaConfig(**SHAPE, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        "Jamba.* does not take its attention",
    ),
    "diffllama": (DiffLlamaConfig(**SHAPE), "DiffLlama.* calls attention more than once"),
    "doge": (DogeConfig(**SHAPE), "Doge.* changes the attention mask"),
    "nemotron": (NemotronConfig(**SHAPE), "replaced in 0 of the 2 layers of Nemotron"),
    "falcon_alibi": (
        FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True),
        "Falcon",
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


@pytest.mark.parametrize(
    ("config", "kind", "limit"),
    [(LONG_PHI3, "longrope", 32), (SHARED["dynamic_rope_within_its_positions"], "dynamic", 128)],
)
def test_a_rope_that_scales_is_plain_up_to_its_limit(config: Any, kind: str, limit: int) -> None:
    model = model_of(config)
    assert choose_layout(model, longest=limit).name == "shared"
    layout = choose_layout(model, longest=limit + 1)
    assert layout.name == "padded"
    assert f"rope of type {kind}" in layout.reason


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (PADDED["mistral"][0], 16),
        (PADDED["gemma3"][0], 16),
        (LONG_PHI3, 32),
        (SHARED["dynamic_rope_within_its_positions"], 128),
        (SHARED["llama"], None),
        (SHARED["mistral_without_window"], None),
        (SHARED["qwen2"], None),
    ],
)
def test_up_to_its_reach_a_model_shares(config: Any, reach: int | None) -> None:
    model = model_of(config)
    assert plain_reach(model) == reach
    if reach is not None:
        assert choose_layout(model, longest=reach).name == "shared"
        assert choose_layout(model, longest=reach + 1).name == "padded"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("length", [32, 33])
def test_sharded_weights_refuse_rows_whose_number_of_forwards_differs_between_workers(
    num_workers: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(LONG_PHI3)
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks what it has taken
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_workers)
    scorer = PackedScorer(model, choose_layout(model, longest=length))
    rows = pack_texts([np.full(length, 5, np.int32), np.full(3, 6, np.int32)], 0, share=False)
    batch = to_device(rows, torch.device("cpu"), None)
    if num_workers > 1 and length > 32:
        with pytest.raises(
            ConfigError, match=r"`zero_stage` \(3\) on 2 workers.*above 32 tokens.*max_length"
        ):
            scorer(batch)
    else:
        assert scorer(batch).shape == (2,)


def test_a_soft_cap_that_the_model_was_loaded_without_is_not_computed() -> None:
    model = model_of(SHARED["gemma2_with_its_soft_cap"])
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    layout = choose_layout(model)
    assert layout.name == "padded"
    assert "soft-capped" in layout.reason
    assert "sdpa" in layout.reason


def test_looking_at_a_model_changes_nothing() -> None:
    model = model_of(SHARED["llama"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    choose_layout(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_outside_of_dropout_modules_is_seen_and_disabled() -> None:
    config = Starcoder2Config(**SHAPE, residual_dropout=0.1, embedding_dropout=0.1, sliding_window=None)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).train()
    assert "embedding_dropout" in choose_layout(model).reason
    model.config.attention_dropout = 0.0
    disable_dropout(model)
    assert choose_layout(model).name == "shared"
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_the_noise_of_a_router_counts_as_dropout() -> None:
    quiet, noisy = (
        model_of(MixtralConfig(**SHAPE, num_local_experts=2, router_jitter_noise=noise, sliding_window=None))
        for noise in (0.0, 0.1)
    )
    assert choose_layout(quiet).name == "shared"
    assert "jitter_noise" in choose_layout(noisy).reason


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


# Each has dropouts that no `nn.Dropout` and no name of Llama's tells of: Falcon's are read from its config in
# every forward, OPT, BioGPT and FlauBERT leave out whole layers.
SCATTERED: dict[str, PreTrainedConfig] = {
    "falcon": FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5, attention_dropout=0.5
    ),
    "opt": OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        layerdrop=0.5,
    ),
    "biogpt": BioGptConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, layerdrop=0.5
    ),
    "flaubert": FlaubertConfig(emb_dim=32, n_layers=4, n_heads=4, layerdrop=0.5),
}


@pytest.mark.parametrize("family", SCATTERED)
def test_dropouts_by_other_names_are_seen_and_disabled(family: str) -> None:
    config = copy.deepcopy(SCATTERED[family])
    config.vocab_size, config.pad_token_id = 60, 0
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).train()
    tokens = torch.arange(3, 13)[None]

    def scores() -> list[torch.Tensor]:
        return [model(input_ids=tokens).logits for _ in range(4)]

    with torch.no_grad():
        first, *others = scores()
        assert not all(torch.equal(first, other) for other in others)
        assert active_dropout(model) is not None
        disable_dropout(model)
        assert active_dropout(model) is None
        first, *others = scores()
        assert all(torch.equal(first, other) for other in others)


def test_an_adapter_with_dropout_is_seen_through_its_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model_of(SHARED["llama"]), lora)
    assert choose_layout(model, train=True).name == "padded"
    assert choose_layout(model, train=False).name == "shared"
