"""Text -> token ids: the one function, `encode`, that the trainer, the scorer and the server all call.

Conversational text goes through the chat template, without generation prompt, and gets no token added.
Standard text gets EOS where the completion lacks it, and the tokenizer's own special tokens around it; a
BOS that the text already begins with is not put there twice. Rendered text (a prompt already templated by
the caller) takes no template. `tokenize_rows` encodes all completions of a row and cuts them at their
longest common token prefix. Texts are tokenized in one call per batch: pass hundreds, not one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.data.labels import UNRANKED
from rayrm.data.packing import Ids, common_prefix_length
from rayrm.data.piecewise import token_ids
from rayrm.data.preference import PreferenceRow, form_of
from rayrm.data.rendering import TextForm, TextInput, render
from rayrm.errors import ConfigError, RowError, ScoreError

__all__ = [
    "TextForm",
    "TextInput",
    "TokenizedRow",
    "encode",
    "encode_each",
    "prepare_tokenizer",
    "tokenize_rows",
]


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """K completions of one prompt, ranked, cut at the longest token prefix that all of them share.

    `ids` is int32 `[prefix_length + the K tails]`, the tails in the row's own order; `lengths` are whole, the
    prefix included. A tail may be empty. `ranks`: lower is better, equal ones are ties, and what is
    `UNRANKED` is not compared. `margin` is that of each comparison, `target` the probability that its better
    completion wins. `ratings`: the scores of the completions where the row says them, else empty.
    `attributes`: their ratings by each of the run's attributes, completion after completion, NaN where there
    is none; empty where nothing is rated.
    A pair is K = 2 with ranks (0, 1): chosen, rejected. `place`: which source and which row of it, both from
    0, where it came out of a set; no part of what the row says.
    """

    ids: Ids
    prefix_length: int
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    margin: float
    place: tuple[int, int] = field(default=(0, -1), compare=False)
    target: float = 1.0
    ratings: tuple[float, ...] = ()
    attributes: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        sequences: Sequence[Ids],
        ranks: Sequence[int],
        margin: float = 0.0,
        *,
        target: float = 1.0,
        ratings: Sequence[float] = (),
        attributes: Sequence[float] = (),
    ) -> TokenizedRow:
        """The row of these whole sequences, int32 `[length]` each, not empty."""
        assert len(sequences) == len(ranks) >= (1 if ratings or attributes else 2)
        assert len(ratings) in (0, len(ranks))
        prefix = common_prefix_length(sequences)
        ids = np.concatenate([sequences[0], *(ids[prefix:] for ids in sequences[1:])])
        lengths = tuple(len(ids) for ids in sequences)
        return cls(
            ids,
            prefix,
            lengths,
            tuple(ranks),
            margin,
            target=target,
            ratings=tuple(ratings),
            attributes=tuple(attributes),
        )

    @classmethod
    def pair(cls, chosen_ids: Ids, rejected_ids: Ids, margin: float = 0.0) -> TokenizedRow:
        """A preference pair, from its whole sides."""
        return cls.of([chosen_ids, rejected_ids], (0, 1), margin)

    @property
    def sequences(self) -> list[Ids]:
        """The K whole sequences, prompt and completion, int32 `[length]` (the first is a view)."""
        whole, begin = [self.ids[: self.lengths[0]]], self.lengths[0]
        for length in self.lengths[1:]:
            end = begin + length - self.prefix_length
            whole.append(np.concatenate([self.ids[: self.prefix_length], self.ids[begin:end]]))
            begin = end
        return whole

    def compared(self, *, ties: bool = False) -> list[tuple[int, int]]:
        """Which completion is better than which, as (better, worse) places in the row.

        With `ties` also each two of equal rank, once, in the order of both places.
        """
        ranked = [place for place, rank in enumerate(self.ranks) if rank != UNRANKED]
        return [
            (i, j)
            for i in ranked
            for j in ranked
            if self.ranks[i] < self.ranks[j] or (ties and i < j and self.ranks[i] == self.ranks[j])
        ]


def encode(tokenizer: Any, text_form: TextForm, inputs: Sequence[TextInput]) -> list[Ids]:
    """The token ids of each input, int32 `[length]`, by the rules of a model of this text form.

    Raises `ScoreError` for an input that this form cannot take, `ConfigError` where the tokenizer has no
    chat template for conversational text. Nothing is truncated.
    """
    texts = render(tokenizer, text_form, inputs)
    return _ids_of(tokenizer, text_form, [_text(entry) for entry in texts])


def encode_each(tokenizer: Any, text_form: TextForm, inputs: Sequence[TextInput]) -> list[Ids | ScoreError]:
    """As `encode`, but an input that this form cannot take has its error in its place, and the others ids."""
    texts = render(tokenizer, text_form, inputs)
    ids = iter(_ids_of(tokenizer, text_form, [text for text in texts if isinstance(text, str)]))
    return [next(ids) if isinstance(text, str) else text for text in texts]


def tokenize_rows(
    tokenizer: Any, rows: Sequence[PreferenceRow], max_length: int | None
) -> list[TokenizedRow | RowError]:
    """Each row tokenized, or the reason why not, in its place.

    Reasons: too-long (a completion with its prompt exceeds `max_length` tokens: the whole row is left out),
    identical (completions of different ranks are the same ids), bad-ids (a given id outside the vocabulary),
    template-refused.
    """
    encoded: list[list[Ids] | RowError | None] = [None] * len(rows)
    for form in ("standard", "conversational"):
        places = [index for index, row in enumerate(rows) if form_of(row) == form]
        found = _encode_rows(tokenizer, form, [rows[index] for index in places])
        for index, sequences in zip(places, found, strict=True):
            encoded[index] = sequences
    vocabulary_size = len(tokenizer)
    return [
        _cut(row, _given_ids(row, vocabulary_size) if sequences is None else sequences, max_length)
        for row, sequences in zip(rows, encoded, strict=True)
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


def _ids_of(tokenizer: Any, text_form: TextForm, texts: Sequence[str]) -> list[Ids]:
    return token_ids(tokenizer, texts, add_special_tokens=text_form == "standard") if texts else []


def _text(text: str | ScoreError) -> str:
    if isinstance(text, ScoreError):
        raise text
    return text


def _encode_rows(tokenizer: Any, form: TextForm, rows: Sequence[PreferenceRow]) -> list[list[Ids] | RowError]:
    """All completions of every row, as `encode` does it, but a text without ids refuses its row alone."""
    inputs = [
        TextInput(row.prompt, completion, row.tools, row.chat_template_kwargs)
        for row in rows
        for completion in row.completions
    ]
    rendered = iter(render(tokenizer, form, inputs, checked=True))
    texts: list[list[str] | RowError] = []
    for row in rows:
        of_row = list(islice(rendered, len(row.completions)))
        refusals = [text for text in of_row if isinstance(text, ScoreError)]
        texts.append(
            RowError("template-refused", str(refusals[0])) if refusals else [_text(text) for text in of_row]
        )
    kept = [row for row in texts if not isinstance(row, RowError)]
    encoded = iter(_ids_of(tokenizer, form, [text for row in kept for text in row]))
    return [row if isinstance(row, RowError) else list(islice(encoded, len(row))) for row in texts]


def _given_ids(row: PreferenceRow, vocabulary_size: int) -> list[Ids] | RowError:
    assert row.ids is not None
    for name, ids in zip(row.names, row.ids, strict=True):
        if max(ids) >= vocabulary_size:
            return RowError(
                "bad-ids",
                f"`{name}` holds id {max(ids)}, the vocabulary has {vocabulary_size}; tokenize the rows with "
                "this model's tokenizer",
            )
    return [np.asarray(ids, dtype=np.int32) for ids in row.ids]


def _cut(
    row: PreferenceRow, sequences: list[Ids] | RowError, max_length: int | None
) -> TokenizedRow | RowError:
    if isinstance(sequences, RowError):
        return sequences
    lengths = [len(ids) for ids in sequences]
    if max_length is not None and max(lengths) > max_length:
        return RowError(
            "too-long",
            f"`{row.names[lengths.index(max(lengths))]}` has {max(lengths)} tokens with its prompt, "
            f"`max_length` allows {max_length}; raise `max_length` to keep the row",
        )
    seen: dict[bytes, int] = {}
    for place, ids in enumerate(sequences):
        first = seen.setdefault(ids.tobytes(), place)
        if row.ranks[first] != row.ranks[place]:
            return RowError(
                "identical",
                f"`{row.names[first]}` and `{row.names[place]}` are the same {len(ids)} tokens, yet one is "
                "preferred; what is compared must differ; drop the row",
            )
    return TokenizedRow.of(
        sequences,
        row.ranks,
        row.margin,
        target=row.target,
        ratings=row.ratings,
        attributes=row.attributes,
    )


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
