"""Tiny models, tokenizers and preference data, built in memory: nothing is downloaded.

Everything here is seeded, so two calls with the same arguments give the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [
    "the",
    "a",
    "my",
    "your",
    "red",
    "blue",
    "green",
    "small",
    "big",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "river",
    "stone",
    "bread",
    "water",
    "runs",
    "sits",
    "sings",
    "falls",
    "opens",
    "closes",
    "is",
    "was",
    "will",
    "can",
    "how",
    "what",
    "why",
    "when",
    "where",
    "please",
    "thanks",
    "yes",
    "no",
    "never",
    "always",
    "good",
    "bad",
    "true",
    "false",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
]

CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|tools|>",
    "<|end|>",
]


def tiny_tokenizer(*, bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens; `bos` puts `<s>` before every plain text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """Two layers, hidden 32, grouped heads (4 query, 2 key): the smallest shape that has every part."""
    fields: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 1,
    }
    return LlamaConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny Llama reward model with random weights (float32)."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(tiny_llama_config(**overrides))
    return model.float()


def saved_weights(directory: Path) -> dict[str, torch.Tensor]:
    """A saved model's weights (PEFT: the adapter's), from however many files."""
    files = [directory / "adapter_model.safetensors"]
    if not files[0].exists():
        files = sorted(directory.glob("model*.safetensors"))
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def save_tiny(
    directory: Path, *, seed: int = 0, bos: bool = False, chat: bool = True, **overrides: Any
) -> Path:
    """A tiny Llama reward model and its tokenizer in `directory`, as transformers saves them."""
    tiny_model(seed, **overrides).save_pretrained(directory)
    tiny_tokenizer(bos=bos, chat=chat).save_pretrained(directory)
    return directory


def tiny_rows(
    count: int,
    *,
    seed: int = 0,
    conversational: bool = False,
    explicit_prompt: bool = True,
    margin: bool = False,
) -> list[dict[str, Any]]:
    """`count` preference rows in one of TRL's four forms; prompts of 3-12 words, answers of 1-10 words."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + f" {number}?"
        good = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 10))) + " thanks"
        bad = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 10))) + " never"
        row: dict[str, Any]
        if conversational:
            ask = [{"role": "user", "content": prompt}]
            yes = [{"role": "assistant", "content": good}]
            no = [{"role": "assistant", "content": bad}]
            row = {"prompt": ask, "chosen": yes, "rejected": no}
            if not explicit_prompt:
                row = {"chosen": ask + yes, "rejected": ask + no}
        else:
            row = {"prompt": prompt, "chosen": good, "rejected": bad}
            if not explicit_prompt:
                row = {"chosen": prompt + good, "rejected": prompt + bad}
        if margin:
            row["margin"] = round(rng.random(), 3)
        rows.append(row)
    return rows


def tiny_rankings(count: int, *, seed: int = 0, conversational: bool = False) -> list[dict[str, Any]]:
    """`count` rankings: each a prompt with 3 to 5 completions, ranked from 1, some of them tied."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt: Any = " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + f" {number}?"
        completions: list[Any] = [
            " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 10))) + f" {place}"
            for place in range(rng.randint(3, 5))
        ]
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        ranks = [1, 2, *(rng.randint(1, 3) for _ in completions[2:])]
        rng.shuffle(ranks)
        rows.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
