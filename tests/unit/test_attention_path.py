"""Which attention path is taken where: a function of device, precision, head sizes and torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    Gemma2Config,
    MistralConfig,
    PreTrainedModel,
)

from rayrm.config import RewardConfig
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.model.attention_path import choose_path, gpu_path
from rayrm.model.cost import head_sizes
from rayrm.model.tiled import Tiled
from rayrm.serve.scorer import RewardModel
from rayrm.train.evaluation import score_model
from tests.numerics.ranks import tokenized
from tests.tiny import save_tiny, tiny_llama_config, tiny_model

CPU = torch.device("cpu")
AMPERE, TURING = (8, 0), (7, 5)


def latent_attention_config(**overrides: Any) -> DeepseekV3Config:
    """Keys of 8 + 4, values of 8."""
    return DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        num_labels=1,
        **overrides,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_takes_the_varlen_kernel_in_half_precision(dtype: torch.dtype) -> None:
    assert gpu_path(dtype, (64, 64), capability=AMPERE, flash=True).name == "varlen"
    assert gpu_path(dtype, (64, 64), capability=(9, 0), flash=True).name == "varlen"
    assert gpu_path(dtype, (256, 256), capability=AMPERE, flash=True).name == "varlen"


@pytest.mark.parametrize("sizes", [(192, 128), (288, 288), (20, 20)])
def test_heads_that_the_flash_kernel_does_not_take_go_to_flex(sizes: tuple[int, int] | None) -> None:
    path = gpu_path(torch.bfloat16, sizes, capability=AMPERE, flash=True)
    assert (path.name, path.reason) == ("flex", "the flash kernels do not take its heads")


@pytest.mark.parametrize("sizes", [(12, 8), None])
def test_heads_that_no_kernel_takes_go_to_the_loop(sizes: tuple[int, int] | None) -> None:
    path = gpu_path(torch.bfloat16, sizes, capability=AMPERE, flash=True)
    assert str(path).endswith("loop (the flash kernels do not take its heads, FlexAttention neither)")


def test_soft_capped_logits_go_where_they_can_be_capped() -> None:
    path = gpu_path(torch.bfloat16, (64, 64), capability=AMPERE, flash=True, capped=True)
    assert str(path) == "attention path: flex (the flash kernels have no soft cap)"
    assert gpu_path(torch.bfloat16, (8, 8), capability=AMPERE, flash=True, capped=True).name == "loop"
    assert gpu_path(torch.float32, (64, 64), capability=AMPERE, flash=True, capped=True).name == "loop"
    fields = tiny_llama_config().to_dict() | {"head_dim": 8, "model_type": "gemma2"}
    model = AutoModelForSequenceClassification.from_config(Gemma2Config(**fields))
    assert choose_path(model, CPU).name == "loop"
    model.config.attn_logit_softcapping = None
    assert choose_path(model, CPU).name == "tiled"


def test_a_gpu_without_the_flash_kernel_or_in_full_precision() -> None:
    assert gpu_path(torch.bfloat16, (64, 64), capability=AMPERE, flash=False).name == "flex"
    assert gpu_path(torch.float16, (64, 64), capability=TURING, flash=True).name == "loop"
    full = gpu_path(torch.float32, (64, 64), capability=AMPERE, flash=True)
    assert str(full) == "attention path: loop (float32: the flash kernels take bf16 and fp16)"


def test_a_cpu_takes_the_tiles_where_torch_has_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert choose_path(model, CPU).name == "tiled"
    assert choose_path(model, CPU, torch.bfloat16) == choose_path(model, CPU)
    monkeypatch.setattr(Tiled, "available", lambda: False)
    assert choose_path(model, CPU).name == "loop"


def test_keys_and_values_of_different_sizes_take_the_loop_on_a_cpu() -> None:
    config = latent_attention_config()
    assert head_sizes(config) == (12, 8)
    model = AutoModelForSequenceClassification.from_config(config)
    assert choose_path(model, CPU).name == "loop"


def test_head_sizes_are_read_off_the_config() -> None:
    assert head_sizes(tiny_llama_config()) == (8, 8)
    assert head_sizes(tiny_llama_config(head_dim=16)) == (16, 16)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("attention path: ")]


CHOSEN = "attention path: tiled (the CPU's flash kernel over tiles of queries)"


def test_scoring_names_its_path_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save_tiny(tmp_path, chat=False)
    with caplog.at_level(logging.INFO, logger="rayrm"):
        RewardModel.from_pretrained(directory, device="cpu").score(["how"] * 3, ["a", "b", "c"])
    assert lines(caplog) == [CHOSEN]


def test_evaluating_names_its_path_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = TokenizedSet.from_rows(tokenized(4))
    with caplog.at_level(logging.INFO, logger="rayrm"):
        score_model(tiny_model(), rows, RewardConfig(bf16=False, use_cpu=True))
    assert lines(caplog) == [CHOSEN]


def windowed(window: int) -> PreTrainedModel:
    fields = tiny_llama_config().to_dict() | {"sliding_window": window, "model_type": "mistral"}
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(MistralConfig(**fields))
    return model


def test_the_padded_layout_has_no_path_to_name(caplog: pytest.LogCaptureFixture) -> None:
    rows = TokenizedSet.from_rows(tokenized(4))
    with caplog.at_level(logging.INFO, logger="rayrm"):
        score_model(windowed(4), rows, RewardConfig(bf16=False, use_cpu=True))
    assert not lines(caplog)
    assert [line for line in caplog.messages if line.startswith("layout: rows are padded")]


def test_evaluating_rows_within_the_window_pads_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rows = TokenizedSet.from_rows(tokenized(4))
    model = windowed(int(rows.index.lengths.max()))
    with caplog.at_level(logging.INFO, logger="rayrm"):
        score_model(model, rows, RewardConfig(bf16=False, use_cpu=True))
    assert lines(caplog) == [CHOSEN]
