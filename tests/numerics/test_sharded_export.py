"""Where two ranks hold a model in parts, each writes a file of it, and stock transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, Qwen3MoeConfig

from rayrm.serve.saved import saved_files
from rayrm.train.checkpoint import verify_checkpoint
from tests.numerics.ranks import GATHERED, Variant, run_variants
from tests.tiny import saved_weights, tiny_llama_config

NUM_STEPS = 4
ZERO: dict[str, Any] = GATHERED["deepspeed"]["zero_optimization"]
BY_ONE = {"deepspeed": {"zero_optimization": {**ZERO, "stage3_gather_16bit_weights_on_model_save": True}}}
SAVES = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 2}
MODELS = ("llama", "experts")


def save_models(root: Path) -> None:
    torch.manual_seed(4)
    AutoModel.from_config(tiny_llama_config()).save_pretrained(root / "llama")
    fields = {key: value for key, value in tiny_llama_config().to_dict().items() if key in SHAPE}
    experts = Qwen3MoeConfig(
        **fields,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    )
    AutoModel.from_config(experts).save_pretrained(root / "experts")


SHAPE = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "pad_token_id",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    save_models(root)
    variants = [
        Variant(f"{model}-{name}", {**settings, **SAVES}, num_ranks=2, loaded=root / model)
        for model in MODELS
        for name, settings in (("shards", {**GATHERED, "zero_init": True}), ("one", BY_ONE))
    ]
    stopped = Variant(
        "llama-stopped", {**GATHERED, **SAVES}, num_ranks=2, loaded=root / "llama", stop_in=NUM_STEPS
    )
    run_variants([*variants, stopped], root)
    return root


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
@pytest.mark.parametrize("model", MODELS)
def test_each_rank_s_file_holds_its_share_of_the_weights_that_one_file_has(
    runs: Path, model: str, place: str
) -> None:
    one, shards = runs / f"{model}-one" / place, runs / f"{model}-shards" / place
    names = sorted(file.name for file in shards.glob("model*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in one.glob("model*")] == ["model.safetensors"]
    weights, expected = saved_weights(shards), saved_weights(one)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    sizes = [(shards / name).stat().st_size for name in names]
    assert max(sizes) < 0.65 * sum(sizes)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert set(index["weight_map"].values()) == set(names)
    assert {"model.safetensors.index.json", *names} <= set(saved_files(shards).content)
    assert not [file for file in shards.iterdir() if file.name.startswith(".")]
    for run, saved in ((f"{model}-one", one), (f"{model}-shards", shards)):
        card = (saved / "README.md").read_text()
        assert f'from_pretrained("{run}{"/" if place else ""}{place}"' in card


@pytest.mark.parametrize("model", MODELS)
def test_stock_transformers_loads_the_files_of_all_ranks(runs: Path, model: str) -> None:
    ids = torch.arange(5, 25)[None]
    scores = []
    for name in ("one", "shards"):
        loaded, found = AutoModelForSequenceClassification.from_pretrained(
            runs / f"{model}-{name}", output_loading_info=True
        )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        with torch.no_grad():
            scores.append(loaded(ids).logits)
    assert torch.equal(*scores)


def test_a_run_that_stopped_goes_on_from_a_checkpoint_in_several_files(runs: Path) -> None:
    verify_checkpoint(runs / "llama-stopped" / "checkpoint-2")
    stopped, straight = saved_weights(runs / "llama-stopped"), saved_weights(runs / "llama-shards")
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)
