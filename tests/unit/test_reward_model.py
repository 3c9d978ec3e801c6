"""Loading and saving reward models: transformers' own files, and refusals that name the fix."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
)

from rayrm.config import RewardConfig
from rayrm.errors import ModelError
from rayrm.model.adapters import add_adapter, head_name
from rayrm.model.reward_model import check_name, check_num_labels, load_model, load_saved, load_tokenizer
from rayrm.model.saving import copy_saved, save_model
from rayrm.objective import Objective
from rayrm.train.build import ModelSource, build_model, check_source
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_llama_config, tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_what_is_saved_loads_with_its_facts(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    model = load_model(str(base))
    objective = Objective.of(RewardConfig(tie_model="rao-kupper", label_smoothing=0.1)).settings
    save_model(model, load_tokenizer(str(base)), target, text_form="conversational", objective=objective)
    loaded = load_saved(target, device="cpu")
    assert loaded.text_form == "conversational"
    assert loaded.objective == {"label_smoothing": 0.1, "tie_model": "rao-kupper", "tie_parameter": 3.0}
    assert Objective.of(RewardConfig(**loaded.objective)) == Objective.of(
        RewardConfig(tie_model="rao-kupper", label_smoothing=0.1)
    )
    assert Objective().settings == {}
    assert loaded.pad_token_id == 0
    assert loaded.max_positions == 512
    assert not loaded.model.training
    assert json.loads((target / "config.json").read_text())["problem_type"] == "regression"
    stock = AutoModelForSequenceClassification.from_pretrained(target).state_dict()
    assert all(torch.equal(stock[name], weight) for name, weight in model.state_dict().items())


def test_a_language_model_gets_a_seeded_head_and_no_warning(
    language_model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    heads = []
    with caplog.at_level(logging.INFO):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            heads.append(load_model(str(language_model)).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert "the reward head of" in caplog.text
    assert "MISSING" not in caplog.text + "".join(capfd.readouterr())


def test_weights_that_are_not_the_head_must_be_there(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks weights that are not the reward head: model\.layers\.2"):
        load_model(str(base))


def test_a_model_given_by_name_is_float32_with_one_label(language_model: Path) -> None:
    model = load_model(str(language_model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.num_labels == 1
    half = load_model(str(language_model), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"num_labels": 2}, r"`num_labels=2`.*require `num_labels=1`"),
        ({"dtype": "float64"}, r"`dtype` \(float64\) is not known"),
    ],
)
def test_unusable_arguments_are_refused(base: Path, init: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(base), **init)


def test_sources_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"has no `config\.json`"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights only"):
        load_model(str(tmp_path))


def test_more_than_one_label_is_refused_before_training() -> None:
    model = LlamaForSequenceClassification(tiny_llama_config(num_labels=3))
    with pytest.raises(ModelError, match=r"has `num_labels=3`, but reward models require `num_labels=1`"):
        check_source(ModelSource(model), RewardConfig())
    check_num_labels(tiny_model())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel has no head that rayrm knows"):
        head_name(LlamaModel(tiny_llama_config()))


def test_a_directory_that_does_not_say_its_form_follows_its_tokenizer(tmp_path: Path) -> None:
    assert load_saved(save_tiny(tmp_path / "chat", chat=True)).text_form == "conversational"
    assert load_saved(save_tiny(tmp_path / "plain", chat=False)).text_form == "standard"


def test_unreadable_facts_are_refused(base: Path) -> None:
    for content in ("{", '{"text_form": "poem"}', "[]"):
        (base / "rayrm.json").write_text(content)
        with pytest.raises(ModelError, match=r"rayrm\.json"):
            load_saved(base)


def test_an_adapter_trains_its_head_and_nothing_of_the_base() -> None:
    from peft import LoraConfig

    adapted = add_adapter(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)


def test_building_sets_pad_dropout_and_checkpointing() -> None:
    model = tiny_model(attention_dropout=0.2, pad_token_id=None)
    built = build_model(ModelSource(model), RewardConfig(), tiny_tokenizer())
    assert built is model
    assert model.config.pad_token_id == 0
    assert model.config.attention_dropout == 0.0
    assert model.is_gradient_checkpointing
    assert model.training


def test_building_grows_embeddings_to_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    built = build_model(ModelSource(tiny_model()), RewardConfig(), tokenizer)
    assert built.get_input_embeddings().num_embeddings == len(tokenizer)  # type: ignore[operator]


def test_one_token_for_pad_and_eos_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with caplog.at_level(logging.WARNING):
        build_model(ModelSource(tiny_model()), RewardConfig(), tokenizer)
    assert "pad and EOS are one token" in caplog.text


@pytest.mark.parametrize("wrong", ["not a config", {"r": 4}])
def test_an_adapter_configuration_must_be_one(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig`"):
        check_source(ModelSource(tiny_model(), wrong), RewardConfig())


def test_an_adapter_on_an_adapter_is_refused() -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear")
    adapted = add_adapter(tiny_model(), lora)
    with pytest.raises(ModelError, match="Merge the adapter first"):
        check_source(ModelSource(adapted, lora), RewardConfig())


def test_a_classifier_of_three_labels_is_refused_by_its_config(tmp_path: Path) -> None:
    save_tiny(tmp_path, num_labels=3)
    with pytest.raises(ModelError, match="num_labels=3"):
        check_name(str(tmp_path), {})


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id"])
def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path, key: str) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 5000}))
    with pytest.raises(ModelError, match=rf"{key}` \(5000\)"):
        check_name(str(tmp_path), {})


def test_a_name_that_is_no_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        load_saved(tmp_path / "none")
    with pytest.raises(ModelError, match="there is no directory `models/none` here"):
        check_name("models/none", {})


def test_a_copy_has_all_that_was_saved_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ messages[0]['content'] }}"}
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    save_model(tiny_model(), tokenizer, saved, text_form="conversational")
    files = {file.relative_to(saved) for file in saved.rglob("*") if file.is_file()}
    (saved / "checkpoint-1").mkdir()
    (saved / "metrics.jsonl").write_text("{}\n")
    copy.mkdir()
    copy_saved(saved, copy)
    assert {file.relative_to(copy) for file in copy.rglob("*") if file.is_file()} == files
    assert Path("additional_chat_templates/rag.jinja") in files


OWN_CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForSequenceClassification, LlamaModel


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    config_class = OwnConfig


AutoModel.register(OwnConfig, OwnModel)


class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
"""


def test_a_models_own_code_is_saved_copied_and_run_where_it_is_trusted(base: Path, tmp_path: Path) -> None:
    (base / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnForSequenceClassification"}
    mapped = {key: f"modeling_own.{name}" for key, name in names.items()}
    own = {"model_type": "own", "architectures": ["OwnForSequenceClassification"], "auto_map": mapped}
    (base / "config.json").write_text(json.dumps({**config, **own}))
    model = load_model(str(base), trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification"
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    save_model(model, load_tokenizer(str(base)), saved, text_form="standard")
    copy.mkdir()
    (saved / "rows-0.jsonl").write_text("{}")
    copy_saved(saved, copy)
    shutil.rmtree(base)
    shutil.rmtree(saved)
    loaded = load_saved(copy, device="cpu", trust_remote_code=True).model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_saved(copy, device="cpu")


def test_a_copy_is_of_the_model_alone_where_another_was_saved_in_more_files(tmp_path: Path) -> None:
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    save_model(tiny_model(seed=1), tiny_tokenizer(), saved, text_form="standard")
    other = tiny_model(seed=2)
    other.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    copy_saved(saved, copy)
    assert sorted(file.name for file in copy.glob("model*")) == ["model.safetensors"]
    expected = load_saved(saved).model.state_dict()
    assert all(
        torch.equal(expected[name], weight) for name, weight in load_saved(copy).model.state_dict().items()
    )
