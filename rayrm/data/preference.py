"""One row of a preference source -> `PreferenceRow`, or a `RowError` with a named reason.

A pair: implicit or explicit prompt x plain strings or message lists as `chosen` and `rejected`, or whole
sides tokenized beforehand (`chosen_ids`, `rejected_ids`). A ranking: `completions` (a list of two or more
strings or message lists), or `completions_ids`, with `ranks`. A scored row: `completion` with `score`, or
`completions` with `scores`, or either with `attributes`. With `margin`, `target`, `tie`, `tools`,
`chat_template_kwargs`, and beside an order ratings by attribute; other columns are ignored, but a row with
images, videos or sound is refused. A field that is None counts as absent, since Arrow fills absent fields
with None, inside messages too. Pure: no tokenizer, no torch, no ray. Whether a row fits the model's limits is
decided in `tokenize`; what a text or a message may be, in `messages`.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

from rayrm.data.attributes import check_rated, parse_attributes
from rayrm.data.labels import (
    UNRANKED,
    USUAL,
    LabelRules,
    check_tied,
    check_unpaired,
    parse_scores,
    parse_target,
    parse_tie,
    scored_columns,
)
from rayrm.data.messages import (
    Text,
    check_completion,
    check_one_form,
    check_only_text,
    is_list,
    parse_text,
    shown,
)
from rayrm.errors import RowError

PairForm = Literal["standard", "conversational", "tokenized"]

_PAIR = ("chosen", "rejected")
# Arguments of `apply_chat_template` that decide what it returns, not what the template says.
_NOT_FOR_TEMPLATE = (
    "self",
    "conversation",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """K completions of one prompt, ranked: lower is better, equal ranks are ties.

    A pair is K = 2 with ranks (0, 1). `prompt` is None when the completions hold the whole dialogue. All
    texts of a row are of one form. A row tokenized beforehand has `ids`, whole sequences, and no text.
    `names` are what the source calls the completions. `margin` is that of each comparison, and `target` the
    probability that its better completion wins. A row whose completions are scored has `ratings`, one each,
    and all its ranks are `UNRANKED`; K may be 1. `attributes`: the ratings of each completion by each of the
    run's attributes, completion after completion, NaN where there is none; empty where nothing is rated.
    """

    completions: tuple[Text, ...]
    ranks: tuple[int, ...] = (0, 1)
    prompt: Text | None = None
    margin: float = 0.0
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    ids: tuple[list[int], ...] | None = None
    names: tuple[str, ...] = _PAIR
    target: float = 1.0
    ratings: tuple[float, ...] = ()
    attributes: tuple[float, ...] = ()


_MOST_MARGIN = 3.4e38
"""The loss is float32, in which more is no finite number."""


def form_of(row: PreferenceRow) -> PairForm:
    """Whether the row is plain text, messages, or token ids."""
    if row.ids is not None:
        return "tokenized"
    return "standard" if isinstance(row.completions[0], str) else "conversational"


def parse_row(row: Mapping[str, Any], labels: LabelRules = USUAL) -> PreferenceRow:
    """The preference that a row holds, where it is one of those that a run with these rules learns from.

    Raises `RowError` whose `reason` is one of: not-an-object, missing-chosen, missing-rejected,
    missing-completions, missing-ranks, wrong-type, mixed-forms, empty-completion, too-few-completions,
    bad-ranks, all-tied, bad-tie, bad-target, bad-score, not-pointwise, bad-attributes, no-attributes,
    bad-roles, bad-margin, bad-tools, bad-template-kwargs, not-utf8, not-text.
    """
    if not isinstance(row, (dict, Mapping)):
        raise RowError(
            "not-an-object",
            f"the row ({shown(row)}) is not an object; write {{'prompt': .., 'chosen': .., 'rejected': ..}}",
        )
    check_only_text(row)
    margin = _margin(row.get("margin"))
    given = _scored_of(row, margin, labels) or _ranking_of(row) or _pair_of(row)
    names, ranks, values = given.names, given.ranks, given.values
    check_tied(row, ranks, margin, labels)
    target = 1.0 if given.scored else parse_target(row, ranks, labels)
    attributes = parse_attributes(row, names, labels)
    if given.scored and not given.ratings and not attributes:
        raise RowError(
            "bad-attributes",
            "`attributes` rates no completion of a row without better or worse; drop the row",
        )
    if given.tokenized:
        ids = tuple(_ids(name, value) for name, value in zip(names, values, strict=True))
        return PreferenceRow(
            (),
            ranks,
            margin=margin,
            ids=ids,
            names=names,
            target=target,
            ratings=given.ratings,
            attributes=attributes,
        )
    prompt = None if row.get("prompt") is None else parse_text("prompt", row["prompt"])
    completions = tuple(parse_text(name, value) for name, value in zip(names, values, strict=True))
    check_one_form({"prompt": prompt, **dict(zip(names, completions, strict=True))})
    for name, completion in zip(names, completions, strict=True):
        check_completion(name, completion, explicit_prompt=bool(prompt))
    return PreferenceRow(
        completions,
        ranks,
        prompt,
        margin,
        parse_tools("tools", row.get("tools")),
        parse_template_kwargs("chat_template_kwargs", row.get("chat_template_kwargs")),
        names=names,
        target=target,
        ratings=given.ratings,
        attributes=attributes,
    )


class _Given(NamedTuple):
    """The completions' names, their ranks, their values, whether these are token ids, and their scores."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    values: list[Any]
    tokenized: bool
    ratings: tuple[float, ...] = ()
    scored: bool = False


def _scored_of(row: Mapping[str, Any], margin: float, labels: LabelRules) -> _Given | None:
    """What a row gives as completions with scores of their own; None for a row of another form."""
    columns = scored_columns(row)
    if columns is None:
        return None
    column, score = columns
    check_unpaired(row, margin)
    values = [row[column]] if score == "score" else _completions(column, row[column], least=1)
    names = (column,) if score == "score" else _places(column, len(values))
    ratings: tuple[float, ...] = ()
    if row.get(score) is not None and (labels.pointwise != "none" or not labels.attributes):
        ratings = parse_scores(score, row[score], len(values), labels)
    else:
        check_rated(row, labels)
    return _Given(names, (UNRANKED,) * len(values), values, column.endswith("_ids"), ratings, True)


def _pair_of(row: Mapping[str, Any]) -> _Given:
    for chosen, rejected in (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")):
        present = [name for name in (chosen, rejected) if row.get(name) is not None]
        if len(present) == 2:
            if chosen == "chosen_input_ids":
                _warn_legacy_columns()
            return _Given((chosen, rejected), _pair_ranks(row), [row[chosen], row[rejected]], True)
        if present and row.get("chosen") is None and row.get("rejected") is None:
            absent = rejected if present == [chosen] else chosen
            raise RowError(
                f"missing-{absent.partition('_')[0]}",
                f"`{absent}` is missing beside `{present[0]}`; a tokenized pair needs both; add it",
            )
    for side in _PAIR:
        if row.get(side) is None:
            raise RowError(
                f"missing-{side}",
                f"`{side}` is missing (the row has {sorted(map(str, row))}); a row needs `chosen` and "
                "`rejected` as text or message lists, or `chosen_ids` and `rejected_ids`, or `completions` "
                "and `ranks`; rename or add it",
            )
    return _Given(_PAIR, _pair_ranks(row), [row[side] for side in _PAIR], False)


def _pair_ranks(row: Mapping[str, Any]) -> tuple[int, int]:
    return (0, 0) if parse_tie(row) else (0, 1)


def _ranking_of(row: Mapping[str, Any]) -> _Given | None:
    """What a row gives as completions with ranks; None for a row that is a pair, or nothing."""
    column = "completions_ids" if row.get("completions_ids") is not None else "completions"
    has = {name for name in (column, "ranks") if row.get(name) is not None}
    sides = [name for name in (*_PAIR, "chosen_ids", "rejected_ids") if row.get(name) is not None]
    if not has or (sides and len(has) < 2):
        return None
    if sides:
        raise RowError(
            "mixed-forms",
            f"the row has `{sides[0]}` and also `{column}` with `ranks`; a row is a pair or a ranking; "
            "remove the columns of one",
        )
    if absent := {column, "ranks"} - has:
        name = absent.pop()
        raise RowError(
            f"missing-{name}",
            f"`{name}` is missing beside `{has.pop()}`; a ranking needs a list of completions and a rank for "
            "each (lower is better); add it",
        )
    completions = _completions(column, row[column], least=2)
    ranks = _ranks(row["ranks"], len(completions))
    if parse_tie(row):
        raise RowError("bad-tie", "`tie` (True) is of a pair; a ranking says ties by equal ranks; remove it")
    return _Given(_places(column, len(completions)), ranks, completions, column == "completions_ids")


def _completions(column: str, completions: Any, *, least: int) -> list[Any]:
    if not is_list(completions):
        raise RowError(
            "wrong-type",
            f"`{column}` ({shown(completions)}) is {type(completions).__name__}; it must be a list of "
            f"{'two or more' if least > 1 else 'completions'}; convert the column",
        )
    if len(completions) < least:
        needs = "a comparison needs two" if least > 1 else "a score needs one"
        raise RowError("too-few-completions", f"`{column}` has {len(completions)}; {needs}; drop the row")
    return list(completions)


def _places(column: str, count: int) -> tuple[str, ...]:
    return tuple(f"{column}[{place}]" for place in range(count))


def _ranks(value: Any, count: int) -> tuple[int, ...]:
    """The ranks as 0, 1, 2, ... without gaps, ties kept."""
    numbers = list(value) if is_list(value) else None
    if numbers is None or len(numbers) != count:
        raise RowError(
            "bad-ranks",
            f"`ranks` ({shown(value)}) must be a list of {count} numbers, one a completion; correct it",
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise RowError(
                "bad-ranks",
                f"`ranks` holds {shown(number)}; a rank is a finite number, lower is better; correct it",
            )
    distinct = sorted(set(numbers))
    return tuple(distinct.index(number) for number in numbers)


def _ids(name: str, value: Any) -> list[int]:
    if not is_list(value) or any(isinstance(i, bool) or not isinstance(i, Integral) or i < 0 for i in value):
        raise RowError(
            "wrong-type",
            f"`{name}` ({shown(value)}) must be a list of token ids, integers from 0; convert the column",
        )
    if not len(value):
        raise RowError(
            "empty-completion", f"`{name}` ([]) has no tokens; a side needs at least one; drop the row"
        )
    return [int(i) for i in value]


@functools.cache
def _warn_legacy_columns() -> None:
    warnings.warn(
        "`chosen_input_ids`/`rejected_input_ids` are the old names of `chosen_ids`/`rejected_ids`; rename "
        "the columns, the old names will go",
        FutureWarning,
        stacklevel=4,
    )


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= _MOST_MARGIN:
        raise RowError(
            "bad-margin",
            f"`margin` ({shown(value)}) must be a finite number; correct it, or remove it for no margin",
        )
    return float(value)


def parse_tools(name: str, value: Any) -> list[Any] | None:
    """Tool schemas, given as a list or as its JSON; `RowError` (bad-tools) for anything else."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise RowError(
                "bad-tools", f"`{name}` ({shown(value)}) is not JSON: {error}; correct it"
            ) from None
    if tools is None:
        return None
    if not is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(
            "bad-tools",
            f"`{name}` ({shown(value)}) must be a list of tool schemas (objects), or that list as a JSON "
            "string; wrap a single tool in a list",
        )
    return list(tools)


def parse_template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Variables of the chat template; `RowError` (bad-template-kwargs) for what is none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(
            "bad-template-kwargs",
            f"`{name}` ({shown(value)}) must be an object of template variables, such as "
            "{'enable_thinking': false}; convert it",
        )
    reserved = sorted(set(value) & set(_NOT_FOR_TEMPLATE))
    if reserved:
        raise RowError(
            "bad-template-kwargs",
            f"`{name}.{reserved[0]}` ({shown(value[reserved[0]])}) is no template variable: "
            "it would change how the text becomes ids; remove it",
        )
    return {str(key): entry for key, entry in value.items() if entry is not None}
