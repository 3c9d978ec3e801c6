"""What a run does with an adapter, of its own or given, in memory or in a directory: its head is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rayrm.config import RewardConfig
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, ModelError
from rayrm.model.adapters import add_adapter
from rayrm.model.head import head_parts
from rayrm.model.reward_model import load_adapted, load_model, load_saved
from rayrm.model.saving import save_model
from rayrm.train.build import ModelSource, build_model, check_source
from rayrm.train.evaluation import score_model
from rayrm.train.worker import train_rank
from rayrm.train.zero import DeepSpeedEngine
from tests.families import save_base
from tests.numerics.ranks import Variant, job_of, tokenized
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

FEW = {"learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", seed=1)


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj"], **changes})


def given_on(base: Path, **changes: Any) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return peft.get_peft_model(model, lora(**changes))


def with_used(count: int) -> list[TokenizedRow]:
    """Rows in which a usual token is the new one, 400."""
    rows = tokenized(count)
    ids = np.concatenate([row.ids for row in rows])
    usual = np.bincount(ids).argmax()
    return [replace(row, ids=np.where(row.ids == usual, np.int32(400), row.ids)) for row in rows]


def run(
    source: ModelSource,
    directory: Path,
    tokenizer: Any = None,
    rows: Callable[[int], list[TokenizedRow]] = tokenized,
    **settings: Any,
) -> tuple[Any, Any]:
    """The trained model, and its scores of twelve rows."""
    job = replace(job_of(Variant("run", {**FEW, **settings}), directory, rows(100)), source=source)
    if tokenizer is not None:
        job = replace(job, tokenizer=tokenizer)
    check_source(source, job.config)
    model = train_rank(job, lambda _: None)
    return model, score_model(model, TokenizedSet.from_rows(rows(12)), job.config)


def scores_of(directory: Path, rows: Callable[[int], list[TokenizedRow]] = tokenized) -> Any:
    config = RewardConfig(bf16=False, use_cpu=True)
    return score_model(load_saved(directory, device="cpu").model, TokenizedSet.from_rows(rows(12)), config)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_given_adapter_is_trained_and_saved_with_its_head(
    task: str | None, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = given_on(base, task_type=task)
    before = load_file(base / "model.safetensors")["score.weight"]
    with caplog.at_level(logging.WARNING):
        trained, scores = run(ModelSource(given), tmp_path / "run")
    assert trained is given
    assert ("`score` was no part of the adapter" in caplog.text) == (task is None)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert not torch.equal(saved["base_model.model.score.weight"], before)
    assert float(saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].abs().max()) > 0
    assert scores_of(tmp_path / "run") == pytest.approx(scores, abs=1e-5)
    stock = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    assert torch.equal(
        stock.base_model.model.score.modules_to_save["default"].weight, saved["base_model.model.score.weight"]
    )


def test_a_head_that_was_frozen_is_trained(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = given_on(base)
    given.base_model.model.score.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        build_model(ModelSource(given), RewardConfig(), tiny_tokenizer())
    assert given.base_model.model.score.modules_to_save["default"].weight.requires_grad
    assert "was frozen: now it is trained" in caplog.text


@pytest.mark.parametrize(("family", "layers"), [("deberta_v2", "query_proj"), ("modernbert", "Wqkv")])
def test_all_parts_of_an_encoders_head_are_trained_and_saved_with_a_given_adapter(
    family: str, layers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_base(family, tmp_path, saved_as="body")
    torch.manual_seed(3)
    given = given_on(base, target_modules=[layers])
    more = next(part for part in head_parts(given) if part != "classifier")
    with caplog.at_level(logging.WARNING):
        build_model(ModelSource(given), RewardConfig(gradient_checkpointing=False), tiny_tokenizer())
    assert f"the reward head `{more}` was no part of the adapter" in caplog.text
    trained = {name for name, parameter in given.named_parameters() if parameter.requires_grad}
    assert {
        part for part in head_parts(given) if any(f".{part}.modules_to_save" in name for name in trained)
    } == {*head_parts(given)}
    (tmp_path / "saved").mkdir()
    save_model(given, tiny_tokenizer(), tmp_path / "saved", text_form="standard")
    torch.manual_seed(4)  # what the files lack would be drawn otherwise
    again = load_adapted(tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, given.eval()(input_ids=ids).logits)


def test_of_several_adapters_the_active_one_is_trained_and_saved(base: Path, tmp_path: Path) -> None:
    given = given_on(base)
    given.add_adapter("second", lora(r=4))
    given.set_adapter("second")
    layer = given.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.lora_A["default"].weight.clone()
    _, scores = run(ModelSource(given), tmp_path / "run")
    assert torch.equal(layer.lora_A["default"].weight, before)
    assert layer.lora_A["second"].weight.grad is None
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 4
    assert not (tmp_path / "run" / "second").exists()
    assert scores_of(tmp_path / "run") == pytest.approx(scores, abs=1e-5)


def test_two_active_adapters_are_refused(base: Path) -> None:
    given = given_on(base, task_type=None)
    given.add_adapter("second", lora(task_type=None))
    given.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match=r"2 active adapters \(default, second\).*set_adapter"):
        check_source(ModelSource(given), RewardConfig())


def test_an_adapter_on_the_head_is_refused_and_a_configuration_of_one_trains_it_whole(base: Path) -> None:
    both = ["q_proj", "score"]
    given = given_on(base, task_type=None, target_modules=both)
    with pytest.raises(ModelError, match=r"modules_to_save=\['score'\]"):
        check_source(ModelSource(given), RewardConfig())
    built: Any = build_model(
        ModelSource(str(base), lora(target_modules=both)), RewardConfig(), tiny_tokenizer()
    )
    head = built.base_model.model.score
    assert head.modules_to_save["default"].weight.requires_grad
    assert not [name for name, _ in head.named_parameters() if "lora" in name]


def test_an_adapter_not_to_be_trained_is_refused(base: Path, tmp_path: Path) -> None:
    given_on(base).save_pretrained(tmp_path / "adapter")
    given = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    with pytest.raises(ModelError, match="is_trainable=True"):
        check_source(ModelSource(given), RewardConfig())


def test_a_method_without_a_saved_head_is_refused(base: Path) -> None:
    tokens = peft.TrainableTokensConfig(task_type="SEQ_CLS", token_indices=[3])
    with pytest.raises(ModelError, match=r"TRAINABLE_TOKENS has no `modules_to_save`"):
        check_source(ModelSource(str(base), tokens), RewardConfig())


def test_a_directory_that_holds_an_adapter_goes_on_training_it(base: Path, tmp_path: Path) -> None:
    _, first = run(ModelSource(str(base), lora()), tmp_path / "first")
    _, second = run(ModelSource(str(tmp_path / "first")), tmp_path / "second", learning_rate=0.0)
    assert second == pytest.approx(first, abs=1e-6)
    _, third = run(ModelSource(str(tmp_path / "first")), tmp_path / "third")
    assert np.abs(third - first).max() > 1e-3
    assert scores_of(tmp_path / "third") == pytest.approx(third, abs=1e-5)
    # The base is named, not the adapter before.
    named = json.loads((tmp_path / "third" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)
    with pytest.raises(ModelError, match="holds an adapter, and `peft_config`"):
        check_source(ModelSource(str(tmp_path / "first"), lora()), RewardConfig())


def test_an_adapter_whose_layers_do_not_fit_its_base_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    given_on(base).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for name, shape, said in (
        ("wide", {"hidden_size": 64}, "size mismatch"),
        ("short", {"num_hidden_layers": 1}, r"it has no place for base_model\S*layers\.1"),
        ("long", {"num_hidden_layers": 3}, r"the adapter has no weights for base_model\S*layers\.2"),
    ):
        config["base_model_name_or_path"] = str(save_tiny(tmp_path / name, **shape))
        file.write_text(json.dumps(config))
        with pytest.raises(ModelError, match=rf"does not fit its base model: .*{said}"):
            load_adapted(tmp_path / "adapter")


def test_a_directory_whose_base_is_gone_or_whose_method_cannot_be_trained_is_refused(
    base: Path, tmp_path: Path
) -> None:
    given_on(base).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone` is not a directory"):
        check_source(ModelSource(str(tmp_path / "adapter")), RewardConfig())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not say its base model"):
        check_source(ModelSource(str(tmp_path / "adapter")), RewardConfig())


def test_a_given_adapter_can_be_sent_to_workers(base: Path) -> None:
    given = given_on(base)
    again = cloudpickle.loads(cloudpickle.dumps(given))
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), again.parameters(), strict=True))
    build_model(ModelSource(again), RewardConfig(), tiny_tokenizer())


def test_a_base_in_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    add_adapter(tiny_model(), lora())
    assert "cannot be loaded by itself" in caplog.text
    assert "`merge_on_save=True`" in caplog.text


def test_a_base_in_memory_can_be_merged(tmp_path: Path) -> None:
    _, scores = run(ModelSource(tiny_model(), lora()), tmp_path / "run", merge_on_save=True)
    assert scores_of(tmp_path / "run") == pytest.approx(scores, abs=1e-5)


def test_merging_without_an_adapter_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"`merge_on_save` \(True\).*model\.lora\.r"):
        check_source(ModelSource(str(base)), RewardConfig(merge_on_save=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}],
    ids=["torch", "zero3"],
)
def test_embeddings_of_added_tokens_are_trained_and_saved(
    settings: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []
    whole = DeepSpeedEngine._module_state

    def seen(engine: DeepSpeedEngine, *, frozen: bool = True) -> Any:
        state = whole(engine, frozen=frozen)
        gathered.append((frozen, state))
        return state

    monkeypatch.setattr(DeepSpeedEngine, "_module_state", seen)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<used>", "<unused>"])
    tokens = (400, 401)
    model, scores = run(ModelSource(str(base), lora()), tmp_path / "run", tokenizer, with_used, **settings)
    config = load_adapted(tmp_path / "run").peft_config["default"]
    assert config.trainable_token_indices == {"embed_tokens": list(tokens)}
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (rows,) = [weight for name, weight in saved.items() if "token_adapter" in name]
    drawn = model.get_base_model().model.embed_tokens.original_module.weight[400:]
    # For the file no frozen weight is gathered; to give back the caller's model, all are.
    for frozen, state in gathered:
        assert any("base_layer.weight" in name for name in state) == frozen
    assert [frozen for frozen, _ in gathered] == ([False, True] if settings else [])
    if not settings:  # what ZeRO-3 gave back is what is saved
        assert (rows - drawn).abs().amax(dim=1).gt(1e-3).tolist() == [True, False]
    assert scores_of(tmp_path / "run", with_used) == pytest.approx(scores, abs=1e-5)
    assert not [name for name in saved if name.endswith("embed_tokens.weight")]


def test_a_method_that_cannot_train_single_tokens_says_so(base: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        ModelError, match=r"IA3 cannot train single tokens.*modules_to_save=\['embed_tokens'\]"
    ):
        build_model(ModelSource(str(base), peft.IA3Config()), RewardConfig(), tokenizer)
    whole = peft.IA3Config(modules_to_save=["embed_tokens"])
    build_model(ModelSource(str(base), whole), RewardConfig(), tokenizer)
    with pytest.raises(ModelError, match="Resize it"):
        build_model(ModelSource(given_on(base)), RewardConfig(), tokenizer)


def test_an_adapter_of_another_name_is_saved_at_the_root(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    given: Any = peft.get_peft_model(model, lora(init_lora_weights=False), adapter_name="reward")
    save_model(given, tiny_tokenizer(), tmp_path / "saved", text_form="standard")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "reward").exists()


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")  # its settings are not looked at here
@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("pissa_niter_4", "drawn anew when it is loaded"),
        ("corda", "which is not saved"),
        ("lora_ga", "gradients, which are not saved"),
    ],
)
def test_a_beginning_that_a_saved_adapter_cannot_repeat_is_refused(
    init: str, said: str, base: Path, tmp_path: Path
) -> None:
    """Loaded again, such adapters had scores that were wrong by more than their spread."""
    begun = lora(init_lora_weights=init)
    with pytest.raises(ModelError, match=rf"`peft_config`: `init_lora_weights` \({init!r}\).*{said}"):
        check_source(ModelSource(str(base), begun), RewardConfig())
    given = given_on(base)
    given.peft_config["default"].init_lora_weights = init
    with pytest.raises(ModelError, match=said):
        check_source(ModelSource(given), RewardConfig())
    given.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    # PEFT's own: whatever it was made with.
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": init}))
    with pytest.raises(ModelError, match=said):
        load_adapted(tmp_path / "saved")


def test_a_beginning_that_waits_for_texts_is_refused(base: Path) -> None:
    with pytest.warns(UserWarning, match="EVA"):
        begun = lora(init_lora_weights="eva")
    with pytest.raises(ConfigError, match=r"initialize_lora_eva_weights.*pass the model"):
        check_source(ModelSource(str(base), begun), RewardConfig())


def test_an_adapter_names_the_revision_of_its_base_and_is_loaded_on_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RewardConfig(model_init_kwargs={"revision": "v2"})
    model = build_model(ModelSource(str(base), lora()), config, tiny_tokenizer())
    save_model(model, tiny_tokenizer(), tmp_path / "saved", text_form="standard")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["revision"] == "v2"
    asked = []

    def load(name: str, **init: Any) -> Any:
        asked.append(init.get("revision"))
        return load_model(name, **init)

    monkeypatch.setattr("rayrm.model.reward_model.load_model", load)
    load_saved(tmp_path / "saved", device="cpu")
    assert asked == ["v2"]
