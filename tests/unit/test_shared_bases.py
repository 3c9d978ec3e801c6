"""Adapters that share a base's weights in memory: scores of merged models, and what cannot be shared."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from rayrm.data.tokenize import TextInput
from rayrm.errors import ModelError, PublishError
from rayrm.model.adapters import add_adapter
from rayrm.model.reward_model import load_model, load_tokenizer, set_pad_token
from rayrm.model.saving import save_model
from rayrm.serve.adapters import AdapterModel, SharedBases, SharedWeights, bases_of
from rayrm.serve.batch_loop import BatchLoop
from rayrm.serve.loaded import LoadedModel
from rayrm.serve.registry import publish
from rayrm.serve.request import ModelPlace, ScoreRequest, text_inputs
from rayrm.serve.saved import check_base
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_llama_config, tiny_tokenizer
from tests.unit.test_scorer import some_texts

# Merging adds two products before they meet the input, and not after: float32 rounding.
MERGED = 1e-4
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}


def save_adapter(directory: Path, base: Path, config: Any, seed: int) -> Path:
    """An adapter of `base` and a head, drawn at random so that both matter."""
    model = load_model(str(base))
    set_pad_token(model, 0)
    adapted = add_adapter(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "ia3" in name or "modules_to_save" in name or name.endswith("bias"):
            scale = 0.02 if "magnitude" in name else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data = noise + (parameter.data if "magnitude" in name or "ia3" in name else 0.0)
    save_model(adapted, load_tokenizer(str(base)), directory, text_form="standard")
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    """A language model, so that the head is the adapter's alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(attention_bias=True, initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(root / "base")
    tiny_tokenizer(chat=False).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def adapters(root: Path, base: Path) -> dict[str, Path]:
    kinds = {
        "lora": LoraConfig(**LORA),
        "other": LoraConfig(**{**LORA, "r": 8}),
        "dora": LoraConfig(**LORA, use_dora=True),
        "bias": LoraConfig(**LORA, bias="lora_only"),
        "embedding": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
        "tokens": LoraConfig(**LORA, trainable_token_indices=[5, 7]),
        "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    return {
        name: save_adapter(root / name, base, config, seed)
        for seed, (name, config) in enumerate(kinds.items())
    }


def scores_of(model: RewardModel) -> list[float]:
    return model.score(*some_texts(16))


def test_adapters_of_several_kinds_on_one_base_score_as_if_merged(adapters: dict[str, Path]) -> None:
    bases = SharedBases("cpu")
    models = {name: bases.open(path) for name, path in adapters.items()}
    # In turns, so that one adapter's weights in another's forward would show.
    for _ in range(2):
        found = {name: scores_of(model) for name, model in models.items()}
    for name, path in adapters.items():
        merged = scores_of(RewardModel.from_pretrained(path, device="cpu"))
        assert found[name] == pytest.approx(merged, abs=MERGED), name
        assert np.std(merged) > 100 * MERGED
    assert min(abs(np.subtract(found["lora"], found[name])).max() for name in found if name != "lora") > 0.01


def test_the_weights_of_the_base_are_in_memory_once(base: Path, adapters: dict[str, Path]) -> None:
    bases = SharedBases("cpu")
    models = {name: bases.open(adapters[name]) for name in ("lora", "other", "ia3")}
    assert bases_of(models) == {str(base): ["lora", "other", "ia3"]}
    of_base = sum(p.numel() for p in load_model(str(base)).parameters())

    def elements(*names: str) -> int:
        addressed = {p.data_ptr(): p.numel() for name in names for p in models[name].parameters}
        return sum(addressed.values())

    own = {name: elements(name) - of_base for name in models}
    assert all(0 < more < of_base for more in own.values())
    # PEFT keeps the head that an adapter replaced: it is the base's, of 32.
    assert elements(*models) == of_base + sum(own.values())


def test_what_an_adapter_trained_of_the_base_is_its_own(base: Path, adapters: dict[str, Path]) -> None:
    bases = SharedBases("cpu")
    first = bases.open(adapters["lora"])
    before = scores_of(first)
    bases.open(adapters["bias"])
    bases.open(adapters["embedding"])
    assert scores_of(first) == before
    assert isinstance(first, AdapterModel)
    stock = load_model(str(base)).state_dict()
    for name, value in first.base.model.state_dict().items():
        if "score" not in name:  # drawn at random, as the base has none
            assert torch.equal(value, stock[name]), name


def test_a_base_goes_with_its_last_adapter(adapters: dict[str, Path]) -> None:
    bases = SharedBases("cpu")
    first, second = bases.open(adapters["lora"]), bases.open(adapters["other"])
    before = scores_of(second)
    del first
    gc.collect()
    assert scores_of(second) == before
    assert len(bases._bases) == 1
    del second
    gc.collect()
    assert not bases._bases


def test_a_base_whose_files_were_replaced_is_another_and_the_probe_tells(tmp_path: Path, base: Path) -> None:
    here = shutil.copytree(base, tmp_path / "base")
    saved = [save_adapter(tmp_path / f"{n}", here, LoraConfig(**LORA), n) for n in range(2)]
    one, two = (
        ModelPlace(str(publish(path, tmp_path / "registry", path.name, merge_lora=False).path), path.name)
        for path in saved
    )
    bases = SharedBases("cpu")
    first = LoadedModel.load("one", one, None, bases)
    expected = scores_of(first.model)
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_llama_config(attention_bias=True, initializer_range=0.2)).save_pretrained(here)
    with pytest.raises(PublishError, match=r"does not score as it did.* an adapter: look whether its base"):
        LoadedModel.load("two", two, None, bases)
    assert scores_of(first.model) == expected


def test_a_base_that_is_missing_or_does_not_fit_is_named(
    tmp_path: Path, base: Path, adapters: dict[str, Path]
) -> None:
    moved = shutil.copytree(adapters["lora"], tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())

    config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})

    def based_on(name: str | None) -> Path:
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return moved

    absent = str(tmp_path / "absent")
    with pytest.raises(PublishError, match=f"needs its base model, and '{absent}'.*--keep-adapter"):
        check_base(based_on(absent))
    with pytest.raises(ModelError, match=f"the base of adapter `{moved}`: model `{absent}`"):
        SharedBases("cpu").open(moved)
    with pytest.raises(ModelError, match="does not say its base model"):
        SharedBases("cpu").open(based_on(None))
    for name, shape, said in (
        ("wide", {"hidden_size": 64}, "size mismatch"),
        ("short", {"num_hidden_layers": 1}, r"it has no place for .*layers\.1"),
        ("long", {"num_hidden_layers": 3}, r"the adapter has no weights for .*layers\.2"),
    ):
        other = save_tiny(tmp_path / name, chat=False, **shape)
        with pytest.raises(ModelError, match=rf"does not fit its base `{other}`: .*{said}.*Put the model"):
            SharedBases("cpu").open(based_on(str(other)))
    check_base(based_on("org/name"))
    check_base(base)


@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["embed_tokens"]}], ids=["rows", "whole_embedding"]
)
def test_an_adapter_with_tokens_of_its_own_scores_as_it_was_trained(
    settings: dict[str, Any], tmp_path: Path, base: Path, adapters: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(str(base))
    before = len(tokenizer)
    tokenizer.add_tokens(["<mine>", "<yours>"])
    model = load_model(str(base))
    model.resize_token_embeddings(len(tokenizer))
    set_pad_token(model, 0)
    adapted = add_adapter(model, LoraConfig(**LORA, **settings), range(before, len(tokenizer)))
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    save_model(adapted, tokenizer, tmp_path / "own", text_form="standard")
    bases = SharedBases("cpu")
    other = bases.open(adapters["lora"])
    alone = scores_of(other)
    shared = bases.open(tmp_path / "own")
    assert isinstance(shared, AdapterModel)
    merged = RewardModel.from_pretrained(tmp_path / "own", device="cpu")
    texts = ["what is it?"] * 3, [" it is <mine>", " it is <yours> <mine>", " it is old"]
    ids = shared.encode(text_inputs(*texts, None, None, rendered=False))
    assert before in ids[0]
    adapted.eval()
    with torch.no_grad():
        trained = [float(adapted(input_ids=torch.as_tensor(one)[None].long()).logits) for one in ids]
    assert np.std(trained) > 100 * MERGED
    assert shared.score(*texts) == pytest.approx(trained, abs=MERGED)
    assert merged.score(*texts) == pytest.approx(trained, abs=MERGED)
    # The base that both share is as it was.
    assert shared.base.model.get_input_embeddings().weight.shape[0] == before
    assert scores_of(other) == alone


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_an_adapter_that_changes_its_base_is_merged_into_one_of_its_own(
    init: str, tmp_path: Path, base: Path, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    bases = SharedBases("cpu")
    shared = bases.open(adapters["lora"])
    before = scores_of(shared)
    changed = save_adapter(tmp_path / init, base, LoraConfig(**LORA, init_lora_weights=init), 9)
    with caplog.at_level("INFO", "rayrm.serve"):
        alone = bases.open(changed)
    assert not isinstance(alone, AdapterModel)
    assert f"`init_lora_weights` ({init!r}) changes the base's weights" in caplog.text
    assert scores_of(alone) == scores_of(RewardModel.from_pretrained(changed, device="cpu"))
    assert scores_of(shared) == before


def test_the_base_leaves_its_device_when_no_adapter_needs_it(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without another device: where the base is sent is noted, and nothing moves."""
    moved: list[str] = []
    monkeypatch.setattr(SharedWeights, "_move", lambda base, device: moved.append(str(device)))
    bases = SharedBases("cpu")
    first, second = bases.open(adapters["lora"]), bases.open(adapters["other"])
    assert isinstance(first, AdapterModel)
    assert isinstance(second, AdapterModel)
    first.base.device = torch.device("meta")
    first._device = second._device = torch.device("meta")
    monkeypatch.setattr("rayrm.serve.adapters.move_in_place", lambda tensors, device: None)
    moved.clear()
    first.offload()
    assert moved == []  # the other computes with it
    second.offload()
    assert moved == ["cpu"]
    first.restore()
    assert moved == ["cpu", "meta"]
    second.restore()
    first.offload()
    moved.clear()
    del second
    gc.collect()
    assert moved == ["cpu"]


@pytest.mark.gpu
def test_adapters_on_a_gpu_share_it_leave_it_and_come_back(adapters: dict[str, Path]) -> None:
    bases = SharedBases("cuda")
    models = [bases.open(adapters[name]) for name in ("lora", "dora")]
    expected = [scores_of(RewardModel.from_pretrained(adapters[n], device="cpu")) for n in ("lora", "dora")]
    # float32 products of another device.
    for _ in range(2):
        for model, scores in zip(models, expected, strict=True):
            assert scores_of(model) == pytest.approx(scores, abs=1e-3)
        for model in models:
            model.offload()
        assert all(p.device.type == "cpu" for model in models for p in model.parameters)


def test_a_roll_of_one_adapter_leaves_the_others_requests_alone(adapters: dict[str, Path]) -> None:
    """The next version is loaded and tried in a thread of its own while both adapters answer."""
    bases = SharedBases("cpu")
    places = {name: ModelPlace(str(path), name) for name, path in adapters.items()}
    loop = BatchLoop({name: LoadedModel.load(name, places[name], 64, bases) for name in ("lora", "ia3")})
    inputs = [f" it is {n}" for n in range(6)]
    expected = {
        name: RewardModel.from_pretrained(path, device="cpu").score(["what is it?"] * 6, inputs)
        for name, path in adapters.items()
        if name in ("lora", "ia3", "dora")
    }

    async def ask(name: str, rolled: asyncio.Event, found: dict[str, int]) -> None:
        after = 0
        while after < 3:
            request = ScoreRequest([TextInput("what is it?", each) for each in inputs], model=name)
            result = await loop.score(request)
            assert result.scores == pytest.approx(expected[result.version], abs=MERGED)
            found[result.version] = found.get(result.version, 0) + 1
            after += rolled.is_set()

    async def story() -> dict[str, int]:
        rolled, found = asyncio.Event(), dict[str, int]()
        asking = [asyncio.create_task(ask(name, rolled, found)) for name in ("lora", "ia3")]
        await asyncio.sleep(0.05)
        new = await asyncio.to_thread(LoadedModel.load, "lora", places["dora"], 64, bases)
        loop.swap(new)
        rolled.set()
        await asyncio.gather(*asking)
        await loop.close()
        return found

    found = asyncio.run(asyncio.wait_for(story(), 60))
    assert min(found["lora"], found["dora"], found["ia3"]) > 0


def test_stock_peft_gives_the_same_scores(base: Path, adapters: dict[str, Path]) -> None:
    model = SharedBases("cpu").open(adapters["lora"])
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(adapters["lora"])).eval()
    prompts, completions = some_texts(8)
    ids = model.encode(text_inputs(prompts, completions, None, None, rendered=False))
    with torch.no_grad():
        expected = [
            float(stock(input_ids=torch.as_tensor(one, dtype=torch.long)[None]).logits) for one in ids
        ]
    assert model.score(prompts, completions) == pytest.approx(expected, abs=MERGED)
