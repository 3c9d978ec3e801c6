"""What a trainer is given and cannot train with is refused before anything is read, in words of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import ConfigError, ModelError
from tests.tiny import save_tiny, tiny_llama_config, tiny_model, tiny_rows, tiny_tokenizer


def trainer(model: Any, output_dir: Path, **settings: Any) -> RewardTrainer:
    usual = {"use_cpu": True, "bf16": False, "disable_tqdm": True}
    return RewardTrainer(
        model,
        RewardConfig(str(output_dir), **{**usual, **settings}),
        train_dataset=tiny_rows(8),
        processing_class=tiny_tokenizer(),
    )


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model` is a int\. Pass a directory or hub name, or a model"):
        trainer(3, tmp_path)


def test_a_language_model_is_refused_with_the_class_that_loads_it(tmp_path: Path) -> None:
    def language_model() -> Any:
        return LlamaForCausalLM(tiny_llama_config())

    adapted = get_peft_model(language_model(), LoraConfig(task_type="CAUSAL_LM"))
    for model, loads in (
        (language_model(), r"`AutoModelForSequenceClassification.from_pretrained\(NAME, num_labels=1\)`"),
        (adapted, r"`AutoPeftModelForSequenceClassification.*num_labels=1, is_trainable=True\)`"),
    ):
        with pytest.raises(
            ModelError, match=rf"LlamaForCausalLM is a language model: .* Load it with {loads}"
        ):
            trainer(model, tmp_path)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    model = LlamaForTokenClassification(tiny_llama_config(num_labels=1))
    with pytest.raises(ModelError, match=r"LlamaForTokenClassification is for another task"):
        trainer(model, tmp_path)


@pytest.mark.usefixtures("ray_cluster")
def test_an_argument_that_no_model_takes_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(ModelError, match=r"`model_init_kwargs` has `num_layerz`, which neither"):
        trainer(str(tmp_path / "model"), tmp_path / "run", model_init_kwargs={"num_layerz": 2})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr_scheduler_kwargs": {"cycles": 2}}, r"\(linear\): .*unexpected keyword argument 'cycles'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            r"^`lr_scheduler_type` \(cosine_with_min_lr\): One of min_lr",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
            r"\{'num_cycles': 2\}.*\(constant\): it takes no further arguments",
        ),
    ],
    ids=["unknown", "missing", "unused"],
)
def test_a_schedule_that_cannot_be_made_is_refused(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        trainer(tiny_model(), tmp_path, **settings)
    assert not list(tmp_path.iterdir())
