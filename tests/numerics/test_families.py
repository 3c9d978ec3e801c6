"""Each family of models gives the stock scores and gradients, in its layout and on each path.

The reference is transformers' own forward: over right-padded rows as trainers call it, and row by row.
"""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    ModernBertConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
)

from rayrm.data.packing import pack_texts
from rayrm.model.attention import AttentionPath
from rayrm.model.attention_path import choose_path, gpu_path
from rayrm.model.attention_probe import softcap_of
from rayrm.model.cost import head_sizes
from rayrm.model.forward import DeviceBatch, PackedScorer, to_device
from rayrm.model.last_layer import PooledAttention
from rayrm.model.layout import Layout, LayoutName, choose_layout, disable_dropout
from rayrm.model.varlen import Varlen
from tests.numerics.test_attention import SHAPE, TREES, ids
from tests.numerics.test_attention_paths import documented_varlen

CPU = torch.device("cpu")
ROWS = [*TREES["deep"], *TREES["pair"]]
LONGEST = max(len(row) for row in ROWS)
HEADS = {**SHAPE, "head_dim": 8}
WINDOW = LONGEST - 3
BERT_SHAPE = {name: SHAPE[name] for name in SHAPE if name != "num_key_value_heads"}
CAPPED = {"attn_logit_softcapping": 0.1, "query_pre_attn_scalar": 1}
"""As near to the logits of a tiny model as 50 is to those of Gemma-2."""
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

SHARED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama_dynamic_rope": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
    "qwen3": Qwen3Config(**HEADS),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral_window_as_long_as_the_rows": MistralConfig(**SHAPE, sliding_window=LONGEST),
    "gemma2": Gemma2Config(**HEADS, sliding_window=LONGEST, **CAPPED),
    "gemma2_without_soft_cap": Gemma2Config(**HEADS, attn_logit_softcapping=None, sliding_window=LONGEST),
    "gemma3_windows_as_long_as_the_rows": Gemma3TextConfig(**HEADS, sliding_window=LONGEST),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "smollm3_layers_without_positions": SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
    "olmo2": Olmo2Config(**SHAPE),
    "deepseek_v3": DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT),
}
PADDED: dict[str, tuple[PreTrainedConfig, str]] = {
    "mistral_window": (
        MistralConfig(**SHAPE, sliding_window=WINDOW),
        rf"sliding window \({WINDOW}\) shorter than the longest row \({LONGEST}\)",
    ),
    "qwen2_window": (
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "sliding window",
    ),
    "gemma2_window": (Gemma2Config(**HEADS, sliding_window=WINDOW), "sliding window"),
    "gemma3_window": (Gemma3TextConfig(**HEADS, sliding_window=WINDOW), "sliding window"),
    "gpt_oss": (GptOssConfig(**HEADS, num_local_experts=4), "attention sinks"),
    "minimax": (
        MiniMaxConfig(**HEADS, num_local_experts=4, layer_types=["linear_attention", "full_attention"]),
        "layers of kind linear_attention",
    ),
    "jamba": (
        JambaConfig(**SHAPE, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=4),
        "does not take its attention",
    ),
    "diffllama": (DiffLlamaConfig(**SHAPE), "more than once"),
    "doge": (DogeConfig(**SHAPE), "changes the attention mask"),
    "nemotron": (NemotronConfig(**SHAPE), "0 of the 2 layers"),
    "bloom_alibi": (BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0), "Bloom"),
    "gpt2": (GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, pad_token_id=0), "GPT2"),
    "opt": (
        OPTConfig(
            vocab_size=60,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        ),
        "OPT",
    ),
    "bert": (BertConfig(**BERT_SHAPE), "Bert"),
    "roberta": (RobertaConfig(**BERT_SHAPE), "Roberta"),
    "deberta_v2": (
        DebertaV2Config(
            **BERT_SHAPE, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]
        ),
        "DebertaV2",
    ),
    "modernbert": (ModernBertConfig(**BERT_SHAPE, cls_token_id=1, sep_token_id=2), "ModernBert"),
}
REACH = 8
"""Shorter than some rows and longer than others."""
SCALING: dict[str, PreTrainedConfig] = {
    "phi3_longrope": Phi3Config(
        **SHAPE,
        sliding_window=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
        original_max_position_embeddings=REACH,
    ),
    "llama_dynamic_rope_beyond_its_positions": LlamaConfig(
        **{**SHAPE, "max_position_embeddings": REACH},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}
CONFIGS = SHARED | {family: config for family, (config, _) in PADDED.items()} | SCALING
CHECKPOINTED = ["llama", "gpt_neox", "gemma2", "gemma3_windows_as_long_as_the_rows"]
GPU_FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mistral_window_as_long_as_the_rows",
    "gemma2",
    "gemma3_windows_as_long_as_the_rows",
    "gpt_neox",
]
Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def model_of(family: str) -> PreTrainedModel:
    """A random model without dropout, in train mode: weights large enough for attention to differ."""
    torch.manual_seed(0)
    config = CONFIGS[family]
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    disable_dropout(model)
    return model.train()


def outcome(model: PreTrainedModel, scores: torch.Tensor) -> Outcome:
    """Scores `[N]`, and the gradients of a sum that weighs every score differently."""
    (scores * torch.linspace(-1, 2, len(scores), device=scores.device)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(scores.detach().std()) > 1e-3
    return scores.detach(), gradients


def stock_padded(family: str) -> Outcome:
    model = model_of(family)
    rows = [torch.as_tensor(row).long() for row in ROWS]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return outcome(model, model(input_ids=padded, attention_mask=mask).logits[:, 0])


def stock_alone(family: str) -> Outcome:
    model = model_of(family)
    logits = [model(input_ids=torch.as_tensor(row)[None].long()).logits[:, 0] for row in ROWS]
    return outcome(model, torch.cat(logits))


def ours(
    family: str, layout: Layout, path: AttentionPath, *, model: PreTrainedModel | None = None
) -> Outcome:
    model = model_of(family) if model is None else model
    scorer = PackedScorer(model, layout, path="loop" if path == "varlen" else path)
    batch = pack_texts(ROWS, 0, share=layout.name == "shared")
    device_batch: DeviceBatch = to_device(batch, CPU, scorer.path)
    if path == "varlen":
        # The kernel that runs on a GPU only, as documented.
        assert isinstance(device_batch.attention, PooledAttention)
        plan = dataclasses.replace(
            device_batch.attention, all_tokens=Varlen.of(batch, CPU, documented_varlen)
        )
        device_batch = dataclasses.replace(device_batch, attention=plan)
    return outcome(model, scorer(device_batch))


def assert_equal(found: Outcome, wanted: Outcome) -> None:
    # The same float32 sums in another order, over two layers.
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        error = float((found[1][name] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()) + 1e-6, name


def paths_of(family: str) -> list[AttentionPath]:
    """The paths that a device may choose for the family, and the definition."""
    paths: list[AttentionPath] = ["dense", "loop"]
    chosen = choose_path(model_of(family), CPU).name
    return [*paths, "varlen", "tiled"] if chosen == "tiled" else paths


@pytest.mark.parametrize("family", SHARED)
def test_a_family_that_shares_gives_the_stock_scores_and_gradients_on_each_path(family: str) -> None:
    layout = choose_layout(model_of(family), longest=LONGEST)
    assert layout == Layout("shared")
    wanted = stock_padded(family)
    assert_equal(stock_alone(family), wanted)
    for path in paths_of(family):
        assert_equal(ours(family, layout, path), wanted)
        assert_equal(ours(family, Layout("packed"), path), wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", SHARED)
def test_flex_gives_each_family_the_stock_scores(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It has no backward on a CPU.
    model = model_of(family)
    scorer = PackedScorer(model, Layout("shared"), path="flex")
    with torch.no_grad():
        found = scorer(to_device(pack_texts(ROWS, 0), CPU, "flex"))
    # The same float32 sums in another order, over two layers.
    torch.testing.assert_close(found, stock_padded(family)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_recomputed_layers_give_the_stock_scores_and_gradients(family: str, reentrant: bool) -> None:
    """Attention is looked up again in backward: with the forest, the cap and the pooled last layer."""
    wanted = stock_padded(family)
    for path in paths_of(family):
        model = model_of(family)
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(ours(family, Layout("shared"), path, model=model), wanted)


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_share_gives_the_stock_scores_and_gradients_padded(family: str) -> None:
    layout = choose_layout(model_of(family), longest=LONGEST)
    assert layout.name == "padded"
    assert re.search(PADDED[family][1], layout.reason), layout.reason
    found = ours(family, layout, "loop")
    assert_equal(found, stock_padded(family))
    assert_equal(found, stock_alone(family))


@pytest.mark.parametrize("num_together", [1, 2, 3, len(ROWS)])
@pytest.mark.parametrize("family", SCALING)
def test_where_positions_scale_a_row_is_computed_as_alone_whatever_the_budget(
    family: str, num_together: int
) -> None:
    rows = [*ROWS, ids(REACH), ids(3 * REACH), ids(REACH + 1), ids(REACH)]
    weights = torch.linspace(-1, 2, len(rows))
    alone, gradients = [], {}
    for row, weight in zip(rows, weights, strict=True):
        # A model of its own: transformers' "dynamic" remembers the longest row that it has seen.
        fresh = model_of(family)
        score = fresh(input_ids=torch.as_tensor(row)[None].long()).logits[0, 0]
        (weight * score).backward()
        alone.append(score.detach())
        for name, parameter in fresh.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    layout = choose_layout(model_of(family), longest=3 * REACH)
    assert "scales with the longest position" in layout.reason
    model = model_of(family)
    scorer = PackedScorer(model, layout, pad_to_multiple_of=32)
    batches = [rows[first : first + num_together] for first in range(0, len(rows), num_together)]
    scores = [scorer(to_device(pack_texts(batch, 0, share=False), CPU, None)) for batch in batches]
    assert_equal(outcome(model, torch.cat(scores)), (torch.stack(alone), gradients))


@pytest.mark.parametrize("family", SCALING)
def test_rows_within_the_limit_share_also_after_longer_ones(family: str) -> None:
    layout = choose_layout(model_of(family), longest=REACH)
    assert layout == Layout("shared")
    rows = [row[:REACH] for row in ROWS]
    batch = pack_texts(rows, 0)
    model = model_of(family).eval()
    with torch.no_grad():
        wanted = [model(input_ids=torch.as_tensor(row)[None].long()).logits[0, 0] for row in rows]
        model(input_ids=torch.as_tensor(ids(3 * REACH))[None].long())
        scorer = PackedScorer(model, layout)
        # The same float32 sums in another order, over two layers.
        torch.testing.assert_close(
            scorer(to_device(batch, CPU, scorer.path)), torch.stack(wanted), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", ["mistral_window", "bert"])
def test_the_padded_forward_keeps_no_keys_for_later(family: str) -> None:
    model = model_of(family)
    kept: list[object] = []
    model.register_forward_hook(lambda _, __, output: kept.append(output.get("past_key_values")))
    PackedScorer(model, Layout("padded"))(to_device(pack_texts(ROWS, 0, share=False), CPU, None))
    assert kept == [None]


def test_only_latent_attention_and_soft_caps_leave_the_tiles_of_the_cpu() -> None:
    assert [family for family in SHARED if "tiled" not in paths_of(family)] == ["gemma2", "deepseek_v3"]


def test_the_soft_cap_of_the_tests_is_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    capped = stock_padded("gemma2")
    monkeypatch.setitem(CONFIGS, "gemma2", copy.deepcopy(CONFIGS["gemma2"]))
    CONFIGS["gemma2"].attn_logit_softcapping = None
    plain = stock_padded("gemma2")
    # A hundred times what the comparisons with the stock forward let pass.
    assert float((capped[0] - plain[0]).norm()) > 1e-2 * float(plain[0].norm())


@pytest.mark.parametrize("window", [LONGEST, WINDOW])
def test_a_soft_capped_model_pads_the_texts_that_do_not_share(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention is ours then too, and knows the cap, the padding and the window."""
    config = Gemma2Config(**HEADS, sliding_window=window, **CAPPED)
    monkeypatch.setitem(CONFIGS, "gemma2", config)
    model = model_of("gemma2")
    scorer = PackedScorer(model, Layout("shared"))
    assert model.config._attn_implementation != "eager"
    batch = to_device(pack_texts(ROWS, 0, share=False), CPU, None)
    assert_equal(outcome(model, scorer(batch)), stock_padded("gemma2"))
    assert scorer.release().config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "path"),
    [
        *(("llama", path) for path in ("dense", "loop", "tiled", "varlen")),
        ("gemma2", "dense"),
        ("gemma2", "loop"),
    ],
)
def test_under_autocast_a_path_computes_in_half_precision(family: str, path: AttentionPath) -> None:
    """Rotary positions leave queries and keys in float32 there, values in bf16: kernels want one dtype."""
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(family, Layout("shared"), path)
    wanted = stock_padded(family)
    # bf16 keeps 8 bits.
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=2e-2)
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm()) <= 5e-2 * float(gradient.norm()) + 1e-6, name


@pytest.mark.parametrize(
    ("family", "head", "layout"),
    [
        ("llama", "score", "packed"),
        ("llama", "score", "padded"),
        ("gpt_neox", "score", "packed"),
        ("gpt2", "score", "padded"),
        ("mistral_window", "score", "padded"),
        ("bert", "classifier", "padded"),
        ("roberta", "classifier.out_proj", "padded"),
        ("modernbert", "classifier", "padded"),
    ],
)
def test_under_autocast_the_heads_product_is_in_float32(family: str, head: str, layout: LayoutName) -> None:
    model = model_of(family).eval()
    scorer = PackedScorer(model, Layout(layout))
    layer = model.get_submodule(head)
    seen: list[torch.Tensor] = []
    # What comes in may be in bf16: its product is not.
    layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    batch = to_device(pack_texts(ROWS, 0, share=False), CPU, scorer.path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = scorer(batch)
    with torch.no_grad():
        product = torch.nn.functional.linear(seen[0].float(), layer.weight, layer.bias)
    # Those of all tokens, where the head comes before pooling: each score is one of them.
    nearest = (product.reshape(-1, 1) - scores).abs().min(dim=0).values
    assert scores.dtype == torch.float32
    assert float(nearest.max()) <= 1e-6  # the same float32 sum, at most in another order
    assert not torch.equal(scores, scores.bfloat16().float())
    assert "forward" not in vars(scorer.release().get_submodule(head))


def wide_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with heads of 16: FlexAttention takes none smaller on a GPU."""
    wide = copy.deepcopy(config)
    wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim = 2, 1, 16
    return wide


@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_the_families_for_a_gpu_have_heads_that_its_kernels_take(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, family, wide_heads(CONFIGS[family]))
    sizes = head_sizes(CONFIGS[family])
    assert gpu_path(torch.bfloat16, sizes, capability=(8, 0), flash=False).name == "flex"
    path: AttentionPath = "loop" if "tiled" not in paths_of(family) else "varlen"
    assert_equal(ours(family, Layout("shared"), path), stock_padded(family))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["varlen", "flex", "loop"])
@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_on_a_gpu_a_path_gives_the_stock_scores_and_gradients(
    family: str, path: AttentionPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    monkeypatch.setitem(CONFIGS, family, wide_heads(CONFIGS[family]))
    if path == "varlen" and softcap_of(CONFIGS[family]) is not None:
        pytest.skip("the kernel has no soft cap")
    model = model_of(family).to(device)
    scorer = PackedScorer(model, Layout("shared"), path=path)
    with torch.autocast("cuda", torch.bfloat16):
        found = outcome(model, scorer(to_device(pack_texts(ROWS, 0), device, path)))
    wanted = stock_padded(family)
    # bf16 keeps 8 bits.
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=0, atol=2e-2)
    for name, gradient in wanted[1].items():
        error = float((found[1][name].cpu() - gradient).norm())
        assert error <= 5e-2 * float(gradient.norm()) + 1e-5, name
