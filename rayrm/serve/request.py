"""A score request as callers write it -> `ScoreRequest`, checked; and what answers it. No torch, no Ray."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rayrm.data.messages import Text
from rayrm.data.packing import Ids
from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError

Truncation = Literal["left", "right"]
Scorable = TextInput | Ids
"""A text, or its token ids as the model's own tokenizer gives them (int32 `[length]`)."""


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where a version of a model lies: what a replica is told to load."""

    path: str
    version: str


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Texts that one caller wants scored by one model; all of them are scored by the same version.

    `model`: which of the service's models or ensembles; None: its only one. `truncation`: what to do with a
    text beyond the model's positions; None: refuse. `version`: the only one that may answer. `left_s`: how
    long the caller still waits; what has not begun by then is not computed. `partial`: a text that cannot be
    scored is told in the answer's `errors`, and the others are scored; else it is the request's error.
    `any_model`: a `model` that the service does not have stands for its only one, if it has one alone.
    """

    inputs: Sequence[Scorable]
    model: str | None = None
    truncation: Truncation | None = None
    version: str | None = None
    left_s: float | None = None
    partial: bool = False
    any_model: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a request spent in each phase on its replica; `total_s` on the caller's side."""

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`scores`, one finite float for each text in order, and the `version` that gave them all.

    `model`: the name of the model or ensemble. `num_tokens`: of each text, as it was scored. `truncated`: the
    places of texts that were cut to the model's positions. `spread`: of an ensemble, the standard deviation
    of its members' scores for each text (None: a single model). An ensemble's `version` joins its members'.
    `errors`: where the request was `partial`, why a text has no score, by its place; its score is NaN.
    """

    scores: list[float]
    version: str
    model: str = ""
    num_tokens: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    spread: list[float] | None = None
    timing: Timing = field(default_factory=Timing)
    errors: dict[int, str] = field(default_factory=dict)


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


def id_inputs(sequences: Sequence[Sequence[int] | Ids]) -> list[Ids]:
    """Token ids as int32 arrays. Raises ScoreError naming the sequence that is empty or holds others."""
    arrays: list[Ids] = []
    for index, ids in enumerate(sequences):
        try:
            array = np.asarray(ids)
            fits = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
        except (ValueError, OverflowError):
            fits = False
        if not fits or array.min() < 0 or array.max() > np.iinfo(np.int32).max:
            raise ScoreError(
                f"`ids` {index} must be a flat list of token ids, at least one and none negative. Pass "
                "[tokenizer(text).input_ids, ...], or int32 arrays."
            )
        arrays.append(np.ascontiguousarray(array, np.int32))
    return arrays
