"""A score request as callers write it -> `ScoreRequest`, checked; and what answers it. No torch, no Ray."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rayrm.data.messages import Text, check_roles, parse_text
from rayrm.data.packing import Ids
from rayrm.data.preference import parse_template_kwargs, parse_tools
from rayrm.data.tokenize import TextInput
from rayrm.errors import RowError, ScoreError

Truncation = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Refused:
    """A text that was found bad where it arrived. `reason` names it as its caller does."""

    reason: str


Scorable = TextInput | Ids | Refused
"""A text, its token ids as the model's own tokenizer gives them (int32 `[length]`), or why it is neither."""


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
    `retries`: how often the caller sent it again, for a lost replica, a full queue or a version that rolls.
    `calibration`: mean and standard deviation of the version's scores on data sets, by the names that they
    were given at publication; an ensemble has none.
    """

    scores: list[float]
    version: str
    model: str = ""
    num_tokens: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    spread: list[float] | None = None
    timing: Timing = field(default_factory=Timing)
    errors: dict[int, str] = field(default_factory=dict)
    retries: int = 0
    calibration: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def text_inputs(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    rendered: bool = False,
) -> list[TextInput]:
    """One input for each (prompt, completion). Raises ScoreError naming what is no text and where it stands.

    An entry None of `prompts`: that completion is a whole text.
    """
    found = text_scorables(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
    check_none_refused(found)
    return [entry for entry in found if isinstance(entry, TextInput)]


def text_scorables(
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    rendered: bool = False,
) -> list[Scorable]:
    """As `text_inputs`, with `Refused` in the place of a bad text.

    Raises ScoreError for what concerns all of them: no lists of one length, bad tools or variables.
    """
    for name, texts in (("prompts", prompts), ("completions", completions)):
        if isinstance(texts, str | Mapping) or not isinstance(texts, Sequence):
            raise ScoreError(
                f"`{name}` ({type(texts).__name__}) must be a list with one entry for each score. "
                f"For a single one pass {name}=[...]."
            )
        if texts and isinstance(texts[0], Mapping) and all(isinstance(text, Mapping) for text in texts):
            raise ScoreError(
                f"`{name}` is one message list and must be a list of them. Pass {name}=[messages]."
            )
    if len(prompts) != len(completions):
        raise ScoreError(
            f"`prompts` has {len(prompts)} entries and `completions` {len(completions)}: they go in pairs. "
            "Repeat the prompt for each of its completions (it is computed once)."
        )
    shown, variables = template_arguments(tools, chat_template_kwargs)
    if rendered and (shown or variables):
        name = "tools" if shown else "chat_template_kwargs"
        raise ScoreError(
            f"`{name}` beside `rendered`: only the chat template reads it, and the texts went through one "
            "already. Remove one of the two."
        )
    return [
        text_scorable(
            f"prompts[{place}]",
            f"completions[{place}]",
            TextInput(prompt, completion, shown, variables, rendered),
        )
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def text_scorable(prompt_name: str, completion_name: str, entry: TextInput) -> TextInput | Refused:
    """The input itself, or why it cannot be scored by any model, under the names of its caller."""
    try:
        prompt = None if entry.prompt is None else parse_text(prompt_name, entry.prompt)
        completion = parse_text(completion_name, entry.completion)
        if not isinstance(completion, str):
            check_roles(completion_name, completion, explicit_prompt=bool(prompt), may_await=True)
    except RowError as error:
        return Refused(f"{error}.")
    return entry


def template_arguments(
    tools: Any, chat_template_kwargs: Any, place: str = ""
) -> tuple[list[Any] | None, dict[str, Any]]:
    """What the chat template is given beside messages. Raises ScoreError; `place` stands behind the names."""
    try:
        return (
            parse_tools(f"tools{place}", tools),
            parse_template_kwargs(f"chat_template_kwargs{place}", chat_template_kwargs),
        )
    except RowError as error:
        raise ScoreError(f"{error}.") from None


def check_none_refused(inputs: Sequence[Scorable]) -> None:
    """Raise ScoreError with the reason of the first input that was refused."""
    for entry in inputs:
        if isinstance(entry, Refused):
            raise ScoreError(entry.reason)


def row_inputs(
    prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
) -> list[TextInput]:
    """As `text_inputs`, for data set columns: `tools` and `chat_template_kwargs` have one entry for each row.

    They decide what the chat template writes, as in training; all other columns have no part in a score.
    """
    inputs = text_inputs(prompts, completions)
    given: dict[str, Sequence[Any]] = {}
    for name in ("tools", "chat_template_kwargs"):
        column = columns.get(name)
        if column is not None and (not isinstance(column, Sequence) or len(column) != len(inputs)):
            raise ScoreError(
                f"column `{name}` must be a list with one entry for each of {len(inputs)} prompts."
            )
        given[name] = [None] * len(inputs) if column is None else column
    return [
        _with_columns(entry, tools, variables, f"[{place}]")
        for place, (entry, tools, variables) in enumerate(
            zip(inputs, given["tools"], given["chat_template_kwargs"], strict=True)
        )
    ]


def _with_columns(entry: TextInput, tools: Any, variables: Any, place: str) -> TextInput:
    if isinstance(variables, str):
        try:
            variables = json.loads(variables)
        except ValueError as error:
            raise ScoreError(f"`chat_template_kwargs{place}` is not JSON: {error}. Correct it.") from None
    shown, known = template_arguments(tools, variables, place)
    return dataclasses.replace(entry, tools=shown, chat_template_kwargs=known)


def check_truncation(truncation: str | None) -> None:
    """Raise ScoreError unless `truncation` is None, "left" or "right"."""
    if truncation is not None and truncation not in get_args(Truncation):
        raise ScoreError(f'`truncation` ({truncation!r}) must be None (refuse), "left" or "right".')


def id_inputs(sequences: Sequence[Sequence[int] | Ids]) -> list[Ids]:
    """Token ids as int32 arrays. Raises ScoreError naming the sequence that is empty or holds others."""
    if isinstance(sequences, str | bytes | Mapping) or not isinstance(sequences, Sequence | np.ndarray):
        raise ScoreError(
            f"`sequences` is {type(sequences).__name__} and must be a list of lists of token ids. Pass "
            "[tokenizer(text).input_ids, ...], or int32 arrays."
        )
    found = [id_scorable(f"sequences[{place}]", ids) for place, ids in enumerate(sequences)]
    check_none_refused(found)
    return [ids for ids in found if not isinstance(ids, Refused)]


def id_scorable(name: str, ids: Any) -> Ids | Refused:
    """Token ids as an int32 array, or why they are none."""
    try:
        array = np.asarray(ids)
        fits = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
    except (ValueError, OverflowError):
        fits = False
    if not fits or array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        return Refused(
            f"`{name}` must be a flat list of token ids, at least one and none negative. Pass "
            "[tokenizer(text).input_ids, ...], or int32 arrays."
        )
    return np.ascontiguousarray(array, np.int32)
