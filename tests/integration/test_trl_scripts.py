"""The scripts of TRL's page on its RewardTrainer run with their import line changed, and log TRL's losses.

Local directories stand for the hub's names. Both compute in fp32: TRL's config has the defaults that it asks
for on a machine without a GPU, and ours is told that the processor has no bf16, from which it falls back.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import trl
import trl.trainer.reward_trainer
from transformers import AutoModelForCausalLM

import rayrm
from tests.tiny import save_tiny, tiny_llama_config, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
TOLERANCE = 1e-4
LOGGED = ("num_tokens", "loss", "learning_rate", "accuracy", "margin", "grad_norm", "mean_reward", "epoch")

QUICK_START = """
from {library} import RewardTrainer
from datasets import load_dataset

trainer = RewardTrainer(
    model="Qwen/Tiny",
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train"),
)
trainer.train()
"""
CONVERTED = """
import json
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer

dataset = load_dataset("json", data_files="arena.jsonl")
dataset = dataset.filter(lambda row: row["winner_tie"] == 0)

def as_dialogues(row):
    answers = [json.loads(row["response_a"])[0], json.loads(row["response_b"])[0]]
    if row["winner_model_a"] != 1:
        answers.reverse()
    ask = {{"role": "user", "content": json.loads(row["prompt"])[0]}}
    return {{
        name: [ask, {{"role": "assistant", "content": text}}]
        for name, text in zip(("chosen", "rejected"), answers)
    }}

dataset = dataset.map(as_dialogues).select_columns(["chosen", "rejected"])
trainer = RewardTrainer("Qwen/Tiny", RewardConfig("converted-{library}"), train_dataset=dataset["train"])
trainer.train()
"""
PRECISION = """
import torch
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer

training_args = RewardConfig("precision-{library}", model_init_kwargs={{"dtype": torch.float32}})
trainer = RewardTrainer(
    model="Qwen/Tiny",
    args=training_args,
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train"),
)
trainer.train()
"""
ADAPTER = """
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer
from peft import LoraConfig

dataset = load_dataset("json", data_files="preferences.jsonl", split="train")

trainer = RewardTrainer(
    "Qwen/Tiny",
    RewardConfig("adapter-{library}", learning_rate=1e-3),
    train_dataset=dataset,
    peft_config=LoraConfig(modules_to_save=["score"]),
)

trainer.train()
"""
CONTINUED = """
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained(
    "Qwen/Tiny-Reward-LoRA", num_labels=1, is_trainable=True
)
dataset = load_dataset("json", data_files="preferences.jsonl", split="train")

trainer = RewardTrainer(model=model, args=RewardConfig("continued-{library}"), train_dataset=dataset)

trainer.train()
"""
TOOLS = """
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer

trainer = RewardTrainer(
    "Qwen/Tiny",
    RewardConfig("tools-{library}", logging_steps=1),
    train_dataset=load_dataset("json", data_files="tools.jsonl", split="train"),
)
trainer.train()
"""
ITERABLE = """
from datasets import load_dataset
from {library} import RewardConfig, RewardTrainer

trainer = RewardTrainer(
    "Qwen/Tiny",
    RewardConfig("iterable-{library}", max_steps=12, logging_steps=1),
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train", streaming=True),
)
trainer.train()
"""
SCRIPTS = {
    "iterable": ITERABLE,
    "quick start": QUICK_START, "converted": CONVERTED, "precision": PRECISION, "adapter": ADAPTER,
    "continued": CONTINUED, "tools": TOOLS,
}  # fmt: skip


@dataclasses.dataclass
class OfThisMachine(trl.RewardConfig):  # type: ignore[misc]
    use_cpu: bool = True
    bf16: bool | None = False


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the scripts name; TRL's config as this machine needs it."""
    base = tmp_path / "Qwen" / "Tiny"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).float().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = peft.LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["score"])
    reward = save_tiny(tmp_path / "Qwen" / "Tiny-Reward")
    model = trl.trainer.reward_trainer.AutoModelForSequenceClassification.from_pretrained(reward)
    peft.get_peft_model(model, adapter).save_pretrained(tmp_path / "Qwen" / "Tiny-Reward-LoRA")
    tiny_tokenizer().save_pretrained(tmp_path / "Qwen" / "Tiny-Reward-LoRA")
    write(tmp_path / "preferences.jsonl", tiny_rows(44, conversational=True))
    write(
        tmp_path / "arena.jsonl",
        [
            {
                "prompt": json.dumps([row["prompt"]]),
                "response_a": json.dumps([row["chosen" if place % 3 else "rejected"]]),
                "response_b": json.dumps([row["rejected" if place % 3 else "chosen"]]),
                "winner_model_a": int(place % 3 != 0),
                "winner_tie": int(place % 7 == 0),
            }
            for place, row in enumerate(tiny_rows(40))
        ],
    )
    tool = json.dumps([{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}])
    call = {"type": "function", "function": {"name": "tide", "arguments": '{"sea": "old"}'}}
    rows = tiny_rows(48, conversational=True)
    for row in rows:
        asked = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        row |= {"prompt": [*row["prompt"], *asked, {"role": "tool", "content": "two stones"}], "tools": tool}
    write(tmp_path / "tools.jsonl", rows)
    monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(trl, "RewardConfig", OfThisMachine)
    monkeypatch.setattr(trl.trainer.reward_trainer, "RewardConfig", OfThisMachine)
    monkeypatch.setattr("rayrm.train.precision.bf16_usable", lambda use_cpu: (False, "not in this test"))
    return tmp_path


def ran(script: str, library: str) -> list[dict[str, Any]]:
    """The log of a script's trainer."""
    space: dict[str, Any] = {}
    exec(compile(script.format(library=library), f"<{library}>", "exec"), space)
    assert type(space["trainer"]).__module__.startswith(library)
    return [record for record in space["trainer"].state.log_history if "loss" in record]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_trls_page_logs_trls_losses(here: Path, name: str) -> None:
    theirs = ran(SCRIPTS[name], "trl")
    if (here / "Tiny-Reward").exists():  # where a script names no directory; ours trains in none but its own
        (here / "Tiny-Reward").rename(here / "theirs")
    ours = ran(SCRIPTS[name], "rayrm")
    assert len(ours) == len(theirs) >= 1
    for key in LOGGED:
        expected, found = (np.array([record[key] for record in log]) for log in (theirs, ours))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=key)
    assert rayrm.RewardTrainer is not trl.RewardTrainer
