"""A score request as callers write it -> `TextInput`s, checked. Shared by scorer and client; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rayrm.data.preference import Text
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


def check_truncation(truncation: str | None) -> None:
    """Raise ScoreError unless `truncation` is None, "left" or "right"."""
    if truncation is not None and truncation not in get_args(Truncation):
        raise ScoreError(f'`truncation` ({truncation!r}) must be None (refuse), "left" or "right".')
