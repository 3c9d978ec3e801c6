"""Text -> token ids: the one function, `encode`, that the trainer, the scorer and the server all call.

Conversational text goes through the chat template, without generation prompt, and gets no token added.
Standard text gets EOS where the completion lacks it, and the tokenizer's own special tokens around it; a
BOS that the text already begins with is not put there twice. Rendered text (a prompt already templated by
the caller) takes no template. `tokenize_pairs` encodes both sides of a pair and cuts them at their longest
common token prefix. Texts are tokenized in one call per batch: pass hundreds, not one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from rayrm.data.preference import PreferencePair, Text, check_messages, check_text, form_of
from rayrm.errors import ConfigError, RowError, ScoreError

TextForm = Literal["standard", "conversational"]
Ids = npt.NDArray[np.int32]
# What a chat template can raise on messages it was not written for: jinja's own errors, and Python's from
# the expressions inside the template.
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class TextInput:
    """One text to encode: a completion and the prompt before it, both strings or both message lists.

    `prompt` None: the completion is the whole text. `rendered`: the strings hold the chat template's output
    already (or the model has none).
    """

    prompt: Text | None
    completion: Text
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rendered: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair cut at the longest common token prefix of its sides.

    `ids` is int32 `[prefix_length + chosen tail + rejected tail]`; the lengths of the sides include the
    prefix. A tail may be empty, never both.
    """

    ids: Ids
    prefix_length: int
    chosen_length: int
    rejected_length: int
    margin: float

    @property
    def chosen_ids(self) -> Ids:
        """The whole chosen side, int32 `[chosen_length]` (a view)."""
        return self.ids[: self.chosen_length]

    @property
    def rejected_ids(self) -> Ids:
        """The whole rejected side, int32 `[rejected_length]` (a copy)."""
        return np.concatenate([self.ids[: self.prefix_length], self.ids[self.chosen_length :]])


def encode(tokenizer: Any, text_form: TextForm, inputs: Sequence[TextInput]) -> list[Ids]:
    """The token ids of each input, int32 `[length]`, by the rules of a model of this text form.

    Raises `ScoreError` for an input that this form cannot take, `ConfigError` where the tokenizer has no
    chat template for conversational text. Nothing is truncated.
    """
    if not inputs:
        return []
    texts = [_render(tokenizer, text_form, entry) for entry in inputs]
    plain = text_form == "standard"
    if plain or any(entry.rendered for entry in inputs):
        opening = _opening_token(tokenizer, plain)
        texts = [
            _open_once(text, opening, in_text=not plain) if plain or entry.rendered else text
            for text, entry in zip(texts, inputs, strict=True)
        ]
    encoded = tokenizer(
        texts,
        add_special_tokens=plain,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no "longer than the model's limit": limits are the callers' business
    )
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def tokenize_pairs(
    tokenizer: Any, pairs: Sequence[PreferencePair], max_length: int | None
) -> list[TokenizedPair | RowError]:
    """Each pair tokenized, or the reason why not, in its place.

    Reasons: too-long (a side exceeds `max_length` tokens), identical (the sides are the same ids),
    bad-ids (a given id outside the vocabulary), template-refused.
    """
    sides: list[tuple[Ids, Ids] | RowError | None] = [None] * len(pairs)
    for form in ("standard", "conversational"):
        places = [index for index, pair in enumerate(pairs) if form_of(pair) == form]
        found = _encode_sides(tokenizer, form, [pairs[index] for index in places])
        for index, side in zip(places, found, strict=True):
            sides[index] = side
    vocabulary_size = len(tokenizer)
    return [
        _cut(_given_ids(pair, vocabulary_size) if side is None else side, pair.margin, max_length)
        for pair, side in zip(pairs, sides, strict=True)
    ]


def prepare_tokenizer(
    tokenizer: Any, *, eos_token: str | None, pad_token: str | None, chat_template_path: str | Path | None
) -> Any:
    """The tokenizer with the run's EOS, chat template and pad token set; it is changed in place.

    `chat_template_path` is a `.jinja` or `.j2` file, taken verbatim, or a directory or hub name of a
    tokenizer whose template, EOS (unless `eos_token` is given) and missing added tokens are taken: the
    vocabulary may grow, and then the model's embeddings must be resized to `len(tokenizer)`.
    Pad: `pad_token`, else the tokenizer's own, else EOS. Raises `ConfigError`.
    """
    vocabulary = tokenizer.get_vocab()
    if eos_token is not None:
        _check_in_vocabulary("eos_token", eos_token, vocabulary)
        tokenizer.eos_token = eos_token
    if chat_template_path is not None:
        _take_template(tokenizer, Path(chat_template_path), keep_eos=eos_token is not None)
        vocabulary = tokenizer.get_vocab()
    pad = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad is None:
        raise ConfigError(
            "`pad_token` (None): the tokenizer has neither a pad nor an EOS token, and a reward model needs "
            "one to find each text's last token; set `pad_token` to a token of the vocabulary"
        )
    _check_in_vocabulary("pad_token", pad, vocabulary)
    tokenizer.pad_token = pad
    return tokenizer


def _render(tokenizer: Any, text_form: TextForm, entry: TextInput) -> str:
    texts = [entry.completion] if entry.prompt is None else [entry.prompt, entry.completion]
    kinds = {isinstance(text, str) for text in texts}
    if len(kinds) > 1:
        raise ScoreError(
            f"the prompt is {_kind(texts[0])} and the completion {_kind(texts[1])}; both must be strings or "
            "both message lists; write the string as [{'role': ..., 'content': ...}]"
        )
    messages = kinds == {False}
    if entry.rendered and messages:
        raise ScoreError(
            "`rendered` (True) with message lists; rendered text is the chat template's output, a string; "
            "pass messages with rendered=False, or the strings"
        )
    if messages and text_form == "standard":
        raise ScoreError(
            "message lists given to a model trained on plain text (text_form 'standard'): it has seen no "
            "chat template; pass strings, or rendered=True with text you templated"
        )
    if not messages and text_form == "conversational" and not entry.rendered:
        raise ScoreError(
            f"plain strings ({texts[-1][:40]!r}) given to a model trained on messages (text_form "
            "'conversational'); pass message lists [{'role': 'user', 'content': ...}], or rendered=True with "
            "text that went through the chat template already"
        )
    if messages:
        return _apply_template(tokenizer, [message for text in texts for message in text], entry)
    return _plain_text(tokenizer, text_form, entry)


def _plain_text(tokenizer: Any, text_form: TextForm, entry: TextInput) -> str:
    prompt, completion = entry.prompt or "", entry.completion
    assert isinstance(prompt, str)
    assert isinstance(completion, str)
    try:
        check_text("prompt", prompt)
        check_text("completion", completion)
    except RowError as error:
        raise ScoreError(str(error)) from None
    eos = tokenizer.eos_token
    if text_form == "standard" and eos and not completion.endswith(eos):
        completion += eos
    return prompt + completion


def _apply_template(tokenizer: Any, messages: list[Any], entry: TextInput) -> str:
    if not tokenizer.chat_template and "chat_template" not in entry.chat_template_kwargs:
        raise ConfigError(
            f"the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no chat template, "
            "which message lists need; set `chat_template_path` to a .jinja file, or to a tokenizer with one"
        )
    try:
        checked = check_messages("messages", messages)
    except RowError as error:
        raise ScoreError(str(error)) from None
    options = {"tools": entry.tools, **entry.chat_template_kwargs}
    try:
        rendered: str = tokenizer.apply_chat_template(checked, tokenize=False, **options)
    except _TEMPLATE_FAILURES as error:
        roles = ", ".join(str(message["role"]) for message in checked)
        raise ScoreError(
            f"the chat template refuses these messages (roles: {roles}): {error}; change the messages, or "
            "the template with `chat_template_path`"
        ) from error
    return rendered


def _opening_token(tokenizer: Any, plain: bool) -> str | None:
    """The special token that every training text of this form begins with, or None.

    Plain text: the one the tokenizer puts in front. Conversational: BOS, if the chat template writes it.
    """
    if plain:
        framed = tokenizer("a", add_special_tokens=True)["input_ids"]
        opens = len(framed) > 1 and framed[0] in tokenizer.all_special_ids
        return str(tokenizer.convert_ids_to_tokens(framed[0])) if opens else None
    bos, template = tokenizer.bos_token, tokenizer.chat_template
    if not bos or not template:
        return None
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except _TEMPLATE_FAILURES:
        return None
    return bos if shown.startswith(bos) else None


def _open_once(text: str, opening: str | None, *, in_text: bool) -> str:
    """`text` without the opening token the tokenizer will add, or with exactly one where nobody adds it."""
    if not opening:
        return text
    bare = text
    while bare.startswith(opening):
        bare = bare[len(opening) :]
    return opening + bare if in_text else bare


def _encode_sides(
    tokenizer: Any, form: TextForm, pairs: Sequence[PreferencePair]
) -> list[tuple[Ids, Ids] | RowError]:
    """Both sides of every pair; a batch that holds a refused pair is halved until that pair stands alone."""
    if not pairs:
        return []
    try:
        chosen = encode(tokenizer, form, [_side(pair, pair.chosen) for pair in pairs])
        rejected = encode(tokenizer, form, [_side(pair, pair.rejected) for pair in pairs])
    except ScoreError as error:
        if len(pairs) == 1:
            return [RowError("template-refused", str(error))]
        half = len(pairs) // 2
        return _encode_sides(tokenizer, form, pairs[:half]) + _encode_sides(tokenizer, form, pairs[half:])
    return list(zip(chosen, rejected, strict=True))


def _side(pair: PreferencePair, completion: Text | None) -> TextInput:
    assert completion is not None
    return TextInput(pair.prompt, completion, pair.tools, pair.chat_template_kwargs)


def _given_ids(pair: PreferencePair, vocabulary_size: int) -> tuple[Ids, Ids] | RowError:
    assert pair.chosen_ids is not None
    assert pair.rejected_ids is not None
    for name, ids in (("chosen_ids", pair.chosen_ids), ("rejected_ids", pair.rejected_ids)):
        if max(ids) >= vocabulary_size:
            return RowError(
                "bad-ids",
                f"`{name}` holds id {max(ids)}, the vocabulary has {vocabulary_size}; tokenize the rows with "
                "this model's tokenizer",
            )
    return np.asarray(pair.chosen_ids, dtype=np.int32), np.asarray(pair.rejected_ids, dtype=np.int32)


def _cut(
    sides: tuple[Ids, Ids] | RowError, margin: float, max_length: int | None
) -> TokenizedPair | RowError:
    if isinstance(sides, RowError):
        return sides
    chosen, rejected = sides
    longest = max(len(chosen), len(rejected))
    if max_length is not None and longest > max_length:
        return RowError(
            "too-long",
            f"the {'chosen' if longest == len(chosen) else 'rejected'} side has {longest} tokens, "
            f"`max_length` allows {max_length}; raise `max_length` to keep the pair",
        )
    shortest = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shortest] != rejected[:shortest])
    prefix = int(differ[0]) if len(differ) else shortest
    if prefix == longest:
        return RowError(
            "identical",
            f"`chosen` and `rejected` are the same {longest} tokens; a pair must differ; drop the row",
        )
    ids = np.concatenate([chosen, rejected[prefix:]])
    return TokenizedPair(ids, prefix, len(chosen), len(rejected), margin)


def _take_template(tokenizer: Any, path: Path, *, keep_eos: bool) -> None:
    if path.suffix in (".jinja", ".j2"):
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"`chat_template_path` ({path}) cannot be read: {error}; name a UTF-8 .jinja file"
            ) from error
        return
    from transformers import AutoTokenizer

    try:
        source = AutoTokenizer.from_pretrained(os.fspath(path))
        tokenizer.chat_template = source.get_chat_template()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`chat_template_path` ({path}) gives no chat template: {error}; name a .jinja or .j2 file, or a "
            "tokenizer that has a template"
        ) from error
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in source.added_tokens_decoder.values() if str(token) not in known])
    if source.eos_token and not keep_eos:
        tokenizer.eos_token = source.eos_token


def _check_in_vocabulary(setting: str, token: str, vocabulary: Mapping[str, int]) -> None:
    if token not in vocabulary:
        raise ConfigError(
            f"`{setting}` ({token!r}) is not in the tokenizer's vocabulary of {len(vocabulary)} tokens; name "
            "one that is, or leave the setting out"
        )


def _kind(text: Text) -> str:
    return "a string" if isinstance(text, str) else "a message list"
