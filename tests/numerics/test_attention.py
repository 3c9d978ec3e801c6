"""Forest attention: the segment loop is the dense definition, and both are the stock padded forward.

Over several families, with grouped heads, for pairs and for deeper trees, forward and backward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rayrm.data.packing import PackedBatch, pack_texts
from rayrm.model import tiled
from rayrm.model.attention import AttentionPath, dense_mask
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import Layout, choose_layout

# The same float32 sums in another order, over two layers.
TOLERANCE = 1e-5
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral_wide_window": MistralConfig(**SHAPE, sliding_window=128),
    "phi3": Phi3Config(**SHAPE),
}
RNG = np.random.default_rng(0)


def ids(length: int) -> np.ndarray:
    return RNG.integers(3, 60, length).astype(np.int32)


def deep_tree() -> list[np.ndarray]:
    """Seven sequences: two roots, branches on three levels, a duplicate, a prefix of another, pads inside."""
    root, middle, other = ids(7), ids(4), ids(5)
    padded = ids(6)
    padded[2] = padded[-1] = 0
    return [
        np.concatenate([root, middle, ids(3)]),
        np.concatenate([root, middle, ids(2)]),
        np.concatenate([root, middle]),
        np.concatenate([root, padded]),
        other,
        np.concatenate([root, middle]),
        np.concatenate([other, ids(9)]),
    ]


def pair() -> list[np.ndarray]:
    prefix = ids(9)
    return [np.concatenate([prefix, ids(6)]), np.concatenate([prefix, ids(4)])]


TREES = {"pair": pair(), "deep": deep_tree(), "one": [ids(5)]}


def model_of(family: str, *, checkpointing: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(FAMILIES[family]).float()
    if checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def scores_and_gradients(
    model: PreTrainedModel,
    batch: PackedBatch,
    layout: Layout,
    *,
    path: AttentionPath = "loop",
    pooled: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores `[N]`, and the gradients of a sum that weighs every score differently."""
    scorer = PackedScorer(model, layout, path=path, pooled_last_layer=pooled)
    scores = scorer(to_device(batch, CPU, scorer.path))
    (scores * torch.linspace(-1, 2, len(scores))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return scores.detach(), gradients


def assert_equal(one: tuple[Any, dict[str, Any]], two: tuple[Any, dict[str, Any]]) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=TOLERANCE)
    for name, gradient in one[1].items():
        error = float((gradient - two[1][name]).norm())
        assert error <= 1e-4 * float(two[1][name].norm()) + 1e-7, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_path_is_the_definition_and_the_stock_forward(
    family: str, tree: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = TREES[tree]
    shared, apart = pack_texts(sequences, 0), pack_texts(sequences, 0, share=False)
    assert choose_layout(model_of(family)).name == "shared"
    stock = scores_and_gradients(model_of(family), apart, Layout("padded"))
    loop = scores_and_gradients(model_of(family, checkpointing=checkpointing), shared, Layout("shared"))
    dense = scores_and_gradients(model_of(family), shared, Layout("shared"), path="dense", pooled=False)
    packed = scores_and_gradients(model_of(family), apart, Layout("packed"))
    monkeypatch.setattr(tiled, "_TILE", 3)  # runs of several tiles, some of one query
    tiles = scores_and_gradients(
        model_of(family, checkpointing=checkpointing), shared, Layout("shared"), path="tiled"
    )
    assert len(sequences) == 1 or float(stock[0].std()) > 0.01
    for other in (loop, dense, packed, tiles):
        assert_equal(other, stock)


def test_the_stock_forward_of_one_text_gives_the_same_score() -> None:
    model = model_of("llama").eval()
    sequences = [np.where(text == 0, 3, text) for text in TREES["deep"]]
    scorer = PackedScorer(model, Layout("shared"))
    with torch.no_grad():
        scores = scorer(to_device(pack_texts(sequences, 0), CPU, scorer.path))
        alone = [scorer.release()(input_ids=torch.as_tensor(text)[None].long()).logits for text in sequences]
    torch.testing.assert_close(scores, torch.cat(alone)[:, 0], rtol=0, atol=TOLERANCE)


def test_without_a_forest_the_enabled_model_computes_what_sdpa_computes() -> None:
    model = model_of("llama").eval()
    tokens = torch.as_tensor(np.stack([ids(8), ids(8)])).long()
    mask = torch.ones_like(tokens)
    tokens[0, 5:], mask[0, 5:] = 0, 0
    with torch.no_grad():
        stock = model(input_ids=tokens, attention_mask=mask).logits
        scorer = PackedScorer(model, Layout("shared"))
        enabled = model(input_ids=tokens, attention_mask=mask).logits
    assert model.config._attn_implementation != "sdpa"
    torch.testing.assert_close(stock, enabled, rtol=0, atol=1e-7)  # norms are computed by blocks
    assert scorer.release().config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_a_forward_that_another_library_had_set_stands_again_after_release() -> None:
    """As accelerate's hooks do: on a norm, and on the layer that is pooled."""
    model = model_of("llama").eval()
    hooked = [model.model.norm, model.model.layers[-1]]
    calls = []
    for module in hooked:

        def forward(*given: Any, own: Any = module.forward, **options: Any) -> Any:
            calls.append(own)
            return own(*given, **options)

        module.forward = forward
    before = [module.forward for module in hooked]
    scorer = PackedScorer(model, Layout("shared"))
    scorer(to_device(pack_texts(TREES["pair"], 0), CPU, scorer.path))
    assert [module.forward for module in hooked] != before
    scorer.release()
    assert [module.forward for module in hooked] == before
    calls.clear()
    model(input_ids=torch.arange(3, 9)[None])
    assert len(calls) == 2


def test_the_dense_mask_shows_a_token_its_ancestors_and_its_own_past() -> None:
    text = np.array([5, 6, 7], np.int32)
    batch = pack_texts([text, np.array([5, 8], np.int32)], 0)
    # Packed: 5 | 6 7 | 8.
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert dense_mask(batch).astype(int).tolist() == expected
    assert dense_mask(batch, np.array([3, 1])).astype(int).tolist() == [expected[3], expected[1]]


def test_a_score_in_the_forest_ignores_its_neighbours() -> None:
    model = model_of("qwen3").eval()
    scorer = PackedScorer(model, Layout("shared"))
    with torch.no_grad():
        together = scorer(to_device(pack_texts(TREES["deep"], 0), CPU, scorer.path))
        alone = torch.cat(
            [scorer(to_device(pack_texts([text], 0), CPU, scorer.path)) for text in TREES["deep"]]
        )
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("multiple", [None, 8, 7])
def test_padding_to_a_multiple_changes_no_score(multiple: int | None) -> None:
    model = model_of("llama").eval()
    batch = to_device(pack_texts(TREES["deep"], 0, share=False), CPU, None)
    with torch.no_grad():
        plain = PackedScorer(model, Layout("padded"))(batch)
        wider = PackedScorer(model, Layout("padded"), pad_to_multiple_of=multiple)(batch)
    torch.testing.assert_close(wider, plain, rtol=0, atol=TOLERANCE)
