"""Texts -> ids as their tokenizer makes them, each piece between special tokens computed once a call.

Special tokens cut a text before anything else is done to it. What stands between two of them is normalized,
split and encoded alone, so its ids do not depend on what is beside it: a system prompt, or the prompt of a
pair's two sides, needs to be encoded once. A piece keeps the special token before it: some tokenizers treat a
text's beginning in their own way, and no words may come to stand there that did not. This holds for texts
without tokens added around them, and for tokenizers whose added tokens leave the text beside them alone; a
tokenizer is asked. The others encode each different text once. Guaranteed, and tested on texts of all kinds:
the ids are those of `tokenizer(texts)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from rayrm.data.packing import Ids


def token_ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
    """int32 `[length]` for each text; equal texts may be given the same array. Nothing is truncated."""
    backend = _backend_of(tokenizer)
    if backend is None:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no "longer than the model's limit": limits are the callers' business
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    # One text has little to share, and a service asks for one at a time.
    cuts = None if add_special_tokens or len(texts) == 1 else _cuts_of(backend)
    cut = [list(cuts.pieces(text)) if cuts else [text] for text in texts]
    pieces = list(dict.fromkeys(chain.from_iterable(cut)))
    encodings = backend.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)
    lists = [encoding.ids for encoding in encodings]
    ends = list(accumulate(map(len, lists), initial=0))
    flat = np.fromiter(chain.from_iterable(lists), np.int32, ends[-1])
    known = {piece: flat[begin:end] for piece, (begin, end) in zip(pieces, pairwise(ends), strict=True)}
    return [
        known[parts[0]] if len(parts) == 1 else np.concatenate([known[part] for part in parts])
        for parts in cut
    ]


class _Cuts:
    """Where texts are cut: before each special token that the tokenizer would find."""

    def __init__(self, found: Sequence[str], cut_before: frozenset[str]) -> None:
        # The longest of those that begin at a place is taken, as the tokenizer takes it.
        longest_first = sorted(found, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first))).finditer
        self._cut_before = cut_before

    def pieces(self, text: str) -> Iterator[str]:
        """The text in pieces, in order; at least one."""
        begin = 0
        for match in self._find(text):
            place = match.start()
            if place > begin and match.group() in self._cut_before:
                yield text[begin:place]
                begin = place
        yield text[begin:] if begin else text


def _cuts_of(backend: Any) -> _Cuts | None:
    """None where a piece's ids could depend on what stands beside it."""
    added = list(backend.get_added_tokens_decoder().values())
    if backend.encode_special_tokens or any(
        token.lstrip or token.rstrip or token.single_word for token in added
    ):
        return None
    # Those that are looked for in normalized text are found later, within the pieces.
    found = [token for token in added if not token.normalized and token.content]
    cut_before = frozenset(token.content for token in found if token.special)
    if not cut_before or not _is_known(backend.pre_tokenizer):
        return None
    return _Cuts([token.content for token in found], cut_before)


def _is_known(pre_tokenizer: Any) -> bool:
    """Whether it is one of tokenizers' own: they see a piece, and whether it begins the text, no more."""
    if pre_tokenizer is None:
        return True
    try:
        pre_tokenizer.__getstate__()
    except Exception:  # of that very class: it, or a part of it, is written in Python
        return False
    return True


def _backend_of(tokenizer: Any) -> Any | None:
    """What does all the work when this tokenizer is called; None where its class does something of its own.

    As the call does, it is freed of what its file says of padding and truncation.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or hasattr(tokenizer, "_switch_to_input_mode"):
        return None
    for name in ("__call__", "_encode_plus", "_convert_encoding"):
        if getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend
