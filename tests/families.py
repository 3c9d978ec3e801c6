"""A tiny configuration of each family of models that tests train, and its base models as others save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

from tests.tiny import tiny_tokenizer

# transformers gives some families' tokenizers tokens of their own: room for them.
_IDS = {"vocab_size": 416, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
# A tiny model with the usual 0.02 gives every text nearly one score.
_SHAPE: dict[str, Any] = {**_IDS, **_SIZES, "intermediate_size": 64, "initializer_range": 0.1}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}

DECODERS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
    "phi3": Phi3Config(**_GROUPED),
    "gpt_neox": GPTNeoXConfig(**_SHAPE),
    "opt": OPTConfig(**_IDS, **_SIZES, word_embed_proj_dim=32, ffn_dim=64, init_std=0.1),
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "roberta": RobertaConfig(**_SHAPE),
    "deberta_v2": DebertaV2Config(
        **_SHAPE,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "modernbert": ModernBertConfig(**_SHAPE, cls_token_id=1, sep_token_id=2, local_attention=16),
}
FAMILIES = DECODERS | ENCODERS


def save_base(family: str, directory: Path, *, saved_as: Literal["language_model", "body"]) -> Path:
    """A random base model of the family and a tokenizer, as transformers saves them: no reward head."""
    auto = AutoModel
    if saved_as == "language_model":
        auto = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    torch.manual_seed(0)
    auto.from_config(FAMILIES[family]).float().save_pretrained(directory)
    tiny_tokenizer(bos=True, chat=False).save_pretrained(directory)
    return directory
