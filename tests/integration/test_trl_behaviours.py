"""What TRL's tests of its RewardTrainer ask for holds here.

Those of the behaviours in huggingface/trl, tests/test_reward_trainer.py (v1.16), that no other test has: the
others are in `test_trl_surface.py`, `test_trl_scripts.py`, `test_against_trl.py`, `test_tokenize.py` and
`test_compute_metrics.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_trainer import DataCollatorForPreference

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.packing import pack_texts
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import Layout
from tests.families import save_base
from tests.integration.test_trl_scripts import OfThisMachine
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_rows, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "bf16": False, "use_cpu": True, "logging_steps": 1,
}  # fmt: skip
ROWS = tiny_rows(12)


def tokenized(rows: Sequence[dict[str, Any]] = ROWS) -> TokenizedSet:
    """The rows without Ray, where their tokenizing is not what is tested."""
    found = tokenize_rows(tiny_tokenizer(), [parse_row(row) for row in rows], None)
    return TokenizedSet.from_rows([row for row in found if isinstance(row, TokenizedRow)])


def trainer_of(
    directory: Path, model: Any, rows: Any, *, peft_config: Any = None, **changes: Any
) -> RewardTrainer:
    own = {name: changes.pop(name) for name in ("processing_class", "eval_dataset") if name in changes}
    args = RewardConfig(str(directory / "run"), **{**SETTINGS, **changes})
    model = str(model) if isinstance(model, Path) else model
    return RewardTrainer(model, args, train_dataset=rows, peft_config=peft_config, **own)


def train(trainer: RewardTrainer) -> set[str]:
    """Train; the names of the parameters that changed. The loss was finite and fell."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert np.isfinite(losses).all()
    return {
        name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])
    }


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("qwen2"), saved_as="language_model")


@pytest.mark.parametrize("multiple", [None, 4])
@pytest.mark.parametrize("pad_token_id", [0, 59])
@pytest.mark.parametrize("num_pairs", [1, 3])
def test_rows_are_padded_as_trls_collator_pads_them(
    num_pairs: int, pad_token_id: int, multiple: int | None
) -> None:
    pairs = [([11, 12, 13, 14, 15], [21, 22]), ([31, 32], [41]), ([51], [52, 53, 54])][:num_pairs]
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
    wanted = DataCollatorForPreference(pad_token_id=pad_token_id, pad_to_multiple_of=multiple)(rows)
    model = tiny_model(pad_token_id=pad_token_id)
    scorer = PackedScorer(model, Layout("padded"), pad_to_multiple_of=multiple)
    given: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _, __, options: given.append(options), with_kwargs=True)
    sides = [np.array(side) for sides in zip(*pairs, strict=True) for side in sides]
    scorer(to_device(pack_texts(sides, pad_token_id, share=False), torch.device("cpu"), None))
    assert len(given) == 1
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(given[0][name], wanted[name]), name


def test_a_classifier_of_two_labels_is_a_value_error_before_anything_is_read(
    language_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(language_model)  # transformers' default: two
    with pytest.raises(ValueError, match="reward models require `num_labels=1`"):
        trainer_of(tmp_path, model, "no/such/rows.jsonl")


def test_weights_in_half_precision_train_and_are_saved_so(language_model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        language_model,
        tokenized(),
        model_init_kwargs={"dtype": torch.float16},
        # At TRL's 0.1 both have a NaN in step 3, which ours is an error about.
        learning_rate=1e-3,
        max_steps=3,
    )
    changed = train(trainer)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float16}
    assert changed == {name for name, _ in trainer.model.named_parameters()}
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen2", None), ("qwen3_moe", ["gate_proj", "up_proj", "down_proj", "score"])],
)
def test_an_adapter_trains_and_its_base_does_not(
    family: str, targets: list[str] | None, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base", saved_as="language_model")
    trainer = trainer_of(tmp_path, base, tokenized(), peft_config=peft.LoraConfig(target_modules=targets))
    names = {name for name, _ in trainer.model.named_parameters()}
    adapter = {name for name in names if "lora_" in name or "score.modules_to_save" in name}
    assert any(("mlp" if targets else "self_attn") in name for name in adapter)
    assert not any("score.lora" in name for name in adapter)
    assert train(trainer) == adapter
    # The head is saved whole, and the scores are those of the files.
    stock = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1).eval()
    rows = trainer.train_dataset
    expected = trainer.predict(tokenized()).predictions
    for place in range(3):
        with torch.no_grad():
            score = float(stock(input_ids=torch.tensor([rows[place]["chosen_ids"]])).logits)
        assert score == pytest.approx(expected[place, 0], abs=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_recomputing_layers_changes_no_loss(language_model: Path, tmp_path: Path, adapted: bool) -> None:
    ways: dict[str, dict[str, Any]] = {
        "kept": {"gradient_checkpointing": False},
        "default": {"gradient_checkpointing": True},
        "reentrant": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }
    logs = {}
    for name, settings in ways.items():
        config = peft.LoraConfig() if adapted else None
        trainer = trainer_of(tmp_path / name, language_model, tokenized(), peft_config=config, **settings)
        assert train(trainer)
        logs[name] = [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]
    for name in ("default", "reentrant"):
        # The same float32 sums; what is computed twice is computed alike.
        np.testing.assert_allclose(logs[name], logs["kept"], rtol=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize("old", [False, True])
def test_rows_of_token_ids_are_taken_and_old_names_are_warned_about(
    ray_cluster: None, language_model: Path, tmp_path: Path, old: bool
) -> None:
    tokenizer = tiny_tokenizer()
    sides = ("chosen_input_ids", "rejected_input_ids") if old else ("chosen_ids", "rejected_ids")
    texts = [
        [tokenizer(row["prompt"] + row[side]).input_ids for row in ROWS] for side in ("chosen", "rejected")
    ]
    rows = Dataset.from_dict(dict(zip(sides, texts, strict=True)))
    if old:
        with pytest.warns(FutureWarning, match=r"`chosen_input_ids`.*rename the columns") as said:
            trainer = trainer_of(tmp_path, language_model, rows)
        assert {warning.filename for warning in said if warning.category is FutureWarning} == {__file__}
    else:
        trainer = trainer_of(tmp_path, language_model, rows)
    assert trainer.train_dataset.column_names == ["chosen_ids", "rejected_ids"]
    assert [row["rejected_ids"] for row in trainer.train_dataset] == texts[1]
    assert train(trainer) == {name for name, _ in trainer.model.named_parameters()}


@pytest.mark.ray
def test_each_row_has_its_own_variables_of_the_chat_template(
    ray_cluster: None, language_model: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'LOUD ' if loud else 'quiet ' }}" + CHAT_TEMPLATE
    rows = tiny_rows(8, conversational=True, explicit_prompt=False)
    rows = [{**row, "chat_template_kwargs": {"loud": bool(place % 2)}} for place, row in enumerate(rows)]
    trainer = trainer_of(tmp_path, language_model, Dataset.from_list(rows), processing_class=tokenizer)
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    for place in range(4):
        opening = tokenizer("LOUD " if place % 2 else "quiet ").input_ids
        for side in ("chosen_ids", "rejected_ids"):
            assert trainer.train_dataset[place][side][: len(opening)] == opening
    assert train(trainer) == {name for name, _ in trainer.model.named_parameters()}


@pytest.mark.ray
@pytest.mark.parametrize("source", ["a file", "another model"])
def test_a_chat_template_comes_from_elsewhere_and_is_saved_as_it_was(
    ray_cluster: None, tmp_path: Path, source: str
) -> None:
    """GPT-NeoX has none of its own; its last bias never moves, as a difference of scores does not know it."""
    base = save_base("gpt_neox", tmp_path / "base", saved_as="language_model")
    template = "{# as written #}\n" + CHAT_TEMPLATE
    if source == "a file":
        path = tmp_path / "template.jinja"
        path.write_text(template)
    else:
        path = tmp_path / "other"
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
    rows = Dataset.from_list(tiny_rows(12, conversational=True))
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    trainer = trainer_of(
        tmp_path,
        base,
        rows,
        chat_template_path=str(path),
        save_strategy="steps",
        save_steps=3,
        num_train_epochs=1,
    )
    names = {name for name, _ in trainer.model.named_parameters()}
    assert train(trainer) == names - {"gpt_neox.final_layer_norm.bias"}
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):
        assert (place / "chat_template.jinja").read_text() == template


def tool(name: str, **properties: str) -> dict[str, Any]:
    fields = {field: {"type": kind} for field, kind in properties.items()}
    parameters = {"type": "object", "properties": fields}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.ray
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "list"])
def test_tools_and_their_calls_are_trls_tokens(
    ray_cluster: None, language_model: Path, tmp_path: Path, as_json: bool
) -> None:
    """Rows whose tools differ, as Arrow stores them: a list's absent fields come back as None."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
        "{% endfor %}<|end|>{% endfor %}"
    )
    rows = tiny_rows(8, conversational=True)
    for place, row in enumerate(rows):
        tools = [tool("tide", sea="string") if place % 2 else tool("moon", day="integer", year="integer")]
        arguments = {"sea": "old"} if place % 2 else {"day": place, "year": 3}
        call = {"type": "function", "function": {"name": "tide", "arguments": arguments}}
        asked = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "one"},
        ]
        row |= {"prompt": [*row["prompt"], *asked], "tools": json.dumps(tools) if as_json else tools}
    data = Dataset.from_list(rows)
    ours = trainer_of(tmp_path, language_model, data, processing_class=tokenizer)
    theirs = trl.RewardTrainer(
        model=tiny_model(),
        args=OfThisMachine(str(tmp_path / "theirs"), **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer,
    )
    for place in range(len(rows)):
        for side in ("chosen_ids", "rejected_ids"):
            assert ours.train_dataset[place][side] == theirs.train_dataset[place][side]
    assert train(ours) == {name for name, _ in ours.model.named_parameters()}


@pytest.mark.ray
def test_sets_are_evaluated_in_their_places_of_the_log_and_raw_rows_whenever_asked(
    ray_cluster: None, language_model: Path, tmp_path: Path
) -> None:
    held = Dataset.from_list(tiny_rows(5, seed=5))
    sets = {"data1": held, "data2": Dataset.from_list(tiny_rows(4, seed=6))}
    trainer = trainer_of(
        tmp_path,
        language_model,
        Dataset.from_list(ROWS),
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=3,
        num_train_epochs=1,
    )
    train(trainer)
    log = list(trainer.state.log_history)
    assert log[-1]["train_loss"] > 0
    assert log[-3]["eval_data1_loss"] > 0
    assert log[-2]["eval_data2_loss"] > 0
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(log[-3]["eval_data1_loss"], abs=1e-6)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_the_model_is_tagged_as_soon_as_there_is_a_trainer(tmp_path: Path, adapted: bool) -> None:
    config = peft.LoraConfig() if adapted else None
    trainer = trainer_of(tmp_path, save_tiny(tmp_path / "base"), tokenized(), peft_config=config)
    # TRL's tag of itself is ours.
    assert {"reward-trainer", "rayrm"} <= set(trainer.model.model_tags)
