"""A score request as callers write it -> `TextInput`s, checked. Shared by scorer and client; no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rayrm.data.messages import Text
from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError

Truncation = Literal["left", "right"]


def text_inputs(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    rendered: bool = False,
) -> list[TextInput]:
    """One input for each (prompt, completion). Raises ScoreError unless both are lists of one length."""
    for name, texts in (("prompts", prompts), ("completions", completions)):
        if isinstance(texts, str | Mapping) or not isinstance(texts, Sequence):
            raise ScoreError(
                f"`{name}` ({type(texts).__name__}) must be a list with one entry for each score. "
                f"For a single one pass {name}=[...]."
            )
        if texts and isinstance(texts[0], Mapping):
            raise ScoreError(
                f"`{name}` is one message list and must be a list of them. Pass {name}=[messages]."
            )
    if len(prompts) != len(completions):
        raise ScoreError(
            f"`prompts` has {len(prompts)} entries and `completions` {len(completions)}: they go in pairs. "
            "Repeat the prompt for each of its completions (it is computed once)."
        )
    extra = dict(chat_template_kwargs or {})
    return [
        TextInput(prompt, completion, tools, extra, rendered)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def row_inputs(
    prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
) -> list[TextInput]:
    """As `text_inputs`, for data set columns: `tools` and `chat_template_kwargs` have one entry for each row.

    They decide what the chat template writes, as in training; all other columns have no part in a score.
    """
    inputs = text_inputs(prompts, completions)
    for name in ("tools", "chat_template_kwargs"):
        column = columns.get(name)
        if column is None:
            continue
        if not isinstance(column, Sequence) or len(column) != len(inputs):
            raise ScoreError(
                f"column `{name}` must be a list with one entry for each of {len(inputs)} prompts."
            )
        values = [json.loads(value) if isinstance(value, str) else value for value in column]
        inputs = [
            entry if value is None else dataclasses.replace(entry, **{name: value})
            for entry, value in zip(inputs, values, strict=True)
        ]
    return inputs


def check_truncation(truncation: str | None) -> None:
    """Raise ScoreError unless `truncation` is None, "left" or "right"."""
    if truncation is not None and truncation not in get_args(Truncation):
        raise ScoreError(f'`truncation` ({truncation!r}) must be None (refuse), "left" or "right".')
