"""A base of 4 or 8 bits: trained under an adapter, and scored on the weights that it was trained on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from rayrm.config import LoraConfig, ModelConfig, QuantizationConfig, RewardConfig
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, ModelError
from rayrm.model.quantization import bitsandbytes_config
from rayrm.model.reward_model import load_saved
from rayrm.runfile import read_run
from rayrm.serve.adapters import AdapterModel, SharedBases
from rayrm.serve.scorer import RewardModel
from rayrm.train.build import ModelSource, build_model, check_source
from rayrm.train.evaluation import score_model
from rayrm.train.launch import peft_settings
from rayrm.train.rundir import identity_of
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Outcome, Variant, job_of, outcome_of, tokenized
from tests.numerics.test_same_gradients import differences
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.test_scorer import some_texts

FOUR = QuantizationConfig(load_in_4bit=True)
EIGHT = BitsAndBytesConfig(load_in_8bit=True)
FEW: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 4, "optim": "sgd", "max_grad_norm": 0.0}


@pytest.fixture
def base(tmp_path: Path) -> str:
    pytest.importorskip("bitsandbytes")
    return str(save_tiny(tmp_path / "base", seed=1, hidden_size=64, intermediate_size=128))


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "target_modules": "all-linear", **changes})


def run(source: ModelSource, directory: Path, **settings: Any) -> tuple[Any, Outcome, Any]:
    """The trained model, what it left, and its scores of twelve rows."""
    job = replace(job_of(Variant("run", {**FEW, **settings}), directory, tokenized()), source=source)
    check_source(source, job.config)
    if "eval_strategy" in settings:
        job = replace(job, eval_sets={"": TokenizedSet.from_rows(tokenized(8))})
    model = train_rank(job, lambda _: None)
    scores = score_model(model, TokenizedSet.from_rows(tokenized(12)), job.config)
    return model, outcome_of(directory), scores


@pytest.mark.parametrize(
    ("quantization", "adapter", "layer", "near"),
    [
        (FOUR, {}, "Linear4bit", 1e-4),
        (FOUR, {"use_dora": True}, "Linear4bit", 1e-4),
        # In 8 bits what comes into a layer is rounded too, while it trains: 1/127 of each row's largest.
        (EIGHT, {}, "Linear8bitLt", 5e-2),
    ],
    ids=["4bit", "4bit_dora", "8bit"],
)
def test_the_saved_adapter_has_the_scores_of_training(
    quantization: Any, adapter: dict[str, Any], layer: str, near: float, base: str, tmp_path: Path
) -> None:
    source = ModelSource(base, lora(**adapter), quantization)
    settings: dict[str, Any] = {"optim": "adamw_torch", "max_steps": 6, "max_grad_norm": 1.0}
    model, outcome, scores = run(source, tmp_path / "run", save_strategy="steps", save_steps=2, **settings)
    kinds = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert kinds == [layer] * 14  # all projections of two layers, and no head
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any("score" in name for name in trained)
    # `lora_B` starts at zero: what it holds is the sum of its gradients.
    moved = [float(w.abs().max()) for name, w in outcome.weights.items() if "lora_B" in name]
    assert len(moved) == 14
    assert min(moved) > 0
    saved = load_saved(tmp_path / "run", device="cpu")
    assert {p.dtype for p in saved.model.parameters()} == {torch.float32}
    config = RewardConfig(bf16=False, use_cpu=True)
    again = score_model(saved.model, TokenizedSet.from_rows(tokenized(12)), config)
    assert np.abs(again - scores).max() < near
    assert scores.std() > 5 * near
    if "use_dora" not in adapter:
        # Served beside others of its base, it would score on weights that were never rounded.
        served = SharedBases("cpu").open(tmp_path / "run")
        assert not isinstance(served, AdapterModel)
        texts = some_texts(8)
        expected = RewardModel.from_pretrained(tmp_path / "run", device="cpu").score(*texts)
        assert served.score(*texts) == pytest.approx(expected, abs=1e-6)
    assert "in few bits when it was trained" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_every_form_of_a_step_has_one_trajectory_in_four_bits(base: str, tmp_path: Path) -> None:
    source = ModelSource(base, lora(), FOUR)
    _, reference, _ = run(source, tmp_path / "packed", share_prefix=False)
    forms: dict[str, dict[str, Any]] = {
        "recomputed": {"gradient_checkpointing": True},
        "zero2": {"zero_stage": 2},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    }
    for name, settings in forms.items():
        _, outcome, _ = run(source, tmp_path / name, **settings)
        assert len(outcome.losses) == FEW["max_steps"]
        assert differences(outcome, reference) == [], name


def test_an_adapter_on_few_bits_goes_on_in_a_new_run(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, first = run(ModelSource(base, lora(), FOUR), tmp_path / "first")
    _, _, second = run(
        ModelSource(str(tmp_path / "first"), None, FOUR), tmp_path / "second", learning_rate=0.0
    )
    assert second == pytest.approx(first, abs=1e-5)
    with caplog.at_level(logging.WARNING, "rayrm.train"):
        build_model(ModelSource(str(tmp_path / "first")), RewardConfig(bf16=False), tiny_tokenizer())
    assert "was trained on weights in 4 or 8 bits, and goes on here on the weights in full" in caplog.text


def test_it_may_stand_among_the_arguments_of_loading(base: str) -> None:
    config = RewardConfig(model_init_kwargs={"quantization_config": EIGHT}, use_cpu=True)
    source = ModelSource(base, lora())
    check_source(source, config)
    built = build_model(source, config, tiny_tokenizer())
    assert "Linear8bitLt" in {type(module).__name__ for module in built.modules()}


def test_what_cannot_be_trained_or_is_said_twice_is_refused(base: str) -> None:
    twice = RewardConfig(model_init_kwargs={"quantization_config": EIGHT})
    with pytest.raises(ValueError, match="given twice"):
        check_source(ModelSource(base, lora(), FOUR), twice)
    with pytest.raises(ConfigError, match=r"cannot be trained: only an adapter.*model\.lora\.r=16"):
        check_source(ModelSource(base, None, FOUR), RewardConfig())
    AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=bitsandbytes_config(FOUR, compute_dtype="float32")
    ).save_pretrained(f"{base}-4bit")
    with pytest.raises(ConfigError, match="cannot be trained: only an adapter"):
        check_source(ModelSource(f"{base}-4bit"), RewardConfig())
    with pytest.raises(ConfigError, match="zero_stage=2"):
        check_source(ModelSource(base, lora(), FOUR), RewardConfig(zero_stage=3))
    with pytest.raises(ConfigError, match="`rayrm publish` adds it"):
        check_source(ModelSource(base, lora(), FOUR), RewardConfig(merge_on_save=True))
    with pytest.raises(ConfigError, match=r"is a dict\. Pass `transformers\.BitsAndBytesConfig"):
        check_source(ModelSource(base, lora(), {"load_in_4bit": True}), RewardConfig())


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("loftq", "LoftQ .* rounds the base itself, from weights in full precision"),
        ("pissa", r"`init_lora_weights` \('pissa'\) needs the base's weights in full precision"),
        ("olora", "needs the base's weights in full precision"),
        ("orthogonal", "needs the base's weights in full precision"),
    ],
)
def test_an_adapter_that_begins_from_the_base_is_refused_on_few_bits(
    init: str, said: str, base: str, tmp_path: Path
) -> None:
    more = {"loftq_config": peft.LoftQConfig(loftq_bits=4)} if init == "loftq" else {}
    begun = lora(init_lora_weights=init, **more)
    with pytest.raises(ModelError, match=said):
        check_source(ModelSource(base, begun, FOUR), RewardConfig())
    check_source(ModelSource(base, begun), RewardConfig())
    # Saved before, in full precision, and now to go on in 4 bits.
    begun.base_model_name_or_path = base
    begun.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ModelError, match=said):
        check_source(ModelSource(str(tmp_path / "saved"), None, FOUR), RewardConfig())


def test_with_a_model_object_it_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_source(ModelSource(tiny_model(), None, FOUR), RewardConfig())
    assert "`quantization_config` is ignored" in caplog.text


def test_a_quantized_object_without_an_adapter_is_refused(base: str) -> None:
    given = AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=bitsandbytes_config(FOUR, compute_dtype="float32"), device_map={"": "cpu"}
    )
    with pytest.raises(ConfigError, match="cannot be trained"):
        check_source(ModelSource(given), RewardConfig())
    check_source(ModelSource(peft.get_peft_model(given, lora())), RewardConfig())


def test_a_run_file_says_it() -> None:
    words = ["model.name=m", "data.train=d", "model.lora.use_dora=true", "model.lora.init_lora_weights=pissa"]
    run = read_run(None, [*words, "model.quantization.load_in_4bit=true"])
    assert run.model == ModelConfig(
        "m", lora=LoraConfig(use_dora=True, init_lora_weights="pissa"), quantization=FOUR
    )
    made = bitsandbytes_config(FOUR, compute_dtype="bfloat16")
    assert made.load_in_4bit
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert "score" in made.llm_int8_skip_modules
    with pytest.raises(ConfigError, match=r"one of them must be true.*load_in_4bit=true"):
        read_run(None, [*words, "model.quantization={}"])


def test_settings_of_an_adapter_reach_peft() -> None:
    made = peft_settings(
        LoraConfig(
            r=8,
            use_dora=True,
            use_rslora=True,
            bias="lora_only",
            modules_to_save=["x"],
            init_lora_weights=False,
        )
    )
    assert (made.r, made.use_dora, made.use_rslora, made.bias) == (8, True, True, "lora_only")
    assert (made.modules_to_save, made.init_lora_weights) == (["x"], False)
    ia3 = peft_settings(
        LoraConfig(kind="ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    assert isinstance(ia3, peft.IA3Config)
    assert ia3.feedforward_modules == {"down_proj"}
    chosen = peft.get_peft_model(tiny_model(), peft_settings(LoraConfig(kind="ia3")))
    assert any("k_proj.ia3_l" in name for name, _ in chosen.named_parameters())
    with pytest.raises(ConfigError, match=r"`r` \(8\) is LoRA's, and `kind` is \"ia3\""):
        LoraConfig(kind="ia3", r=8)
    with pytest.raises(ConfigError, match=r"`feedforward_modules`.*is IA3's"):
        LoraConfig(feedforward_modules=["x"])


def test_how_a_base_is_quantized_is_part_of_a_runs_identity() -> None:
    def of(quantization: Any) -> dict[str, Any]:
        return identity_of(
            RewardConfig(), model="m", adapter=None, data="d", rows_per_step=8, quantization=quantization
        )

    assert of(None) != of(FOUR)
    assert of(FOUR) == of(QuantizationConfig(load_in_4bit=True))
    assert of(EIGHT) != of(BitsAndBytesConfig(load_in_4bit=True))
