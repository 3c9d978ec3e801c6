"""One row of a preference source -> `PreferencePair`, or a `RowError` with a named reason.

Accepted: implicit or explicit prompt x plain strings or message lists, and rows tokenized beforehand
(`chosen_ids`, `rejected_ids`); with `margin`, `tools`, `chat_template_kwargs`. Other columns are ignored.
A field that is None counts as absent, since Arrow fills absent fields with None, inside messages too.
Pure: no tokenizer, no torch, no ray. Whether a pair fits the model's limits is decided in `tokenize`.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from rayrm.errors import RowError

Message = dict[str, Any]
Text = str | list[Message]
PairForm = Literal["standard", "conversational", "tokenized"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Arguments of `apply_chat_template` that decide what it returns, not what the template says.
_NOT_FOR_TEMPLATE = (
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
class PreferencePair:
    """Two completions of one prompt, the first preferred.

    `prompt` is None when `chosen` and `rejected` hold the whole dialogue. All texts of a pair are of one
    form. A pair tokenized beforehand has `chosen_ids` and `rejected_ids` (whole sides) and no text.
    """

    chosen: Text | None
    rejected: Text | None
    prompt: Text | None = None
    margin: float = 0.0
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None


def form_of(pair: PreferencePair) -> PairForm:
    """Whether the pair is plain text, messages, or token ids."""
    if pair.chosen_ids is not None:
        return "tokenized"
    return "standard" if isinstance(pair.chosen, str) else "conversational"


def parse_row(row: Mapping[str, Any]) -> PreferencePair:
    """The pair that a row holds.

    Raises `RowError` whose `reason` is one of: not-an-object, missing-chosen, missing-rejected, wrong-type,
    mixed-forms, empty-completion, bad-roles, bad-margin, bad-tools, bad-template-kwargs, not-utf8.
    """
    if not isinstance(row, Mapping):
        raise RowError(
            "not-an-object",
            f"the row ({_short(row)}) is not an object; write {{'prompt': .., 'chosen': .., 'rejected': ..}}",
        )
    margin = _margin(row.get("margin"))
    ids = _ids_of(row)
    if ids is not None:
        return PreferencePair(None, None, margin=margin, chosen_ids=ids[0], rejected_ids=ids[1])
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise RowError(
                f"missing-{side}",
                f"`{side}` is missing (the row has {sorted(map(str, row))}); a pair needs `chosen` and "
                f"`rejected` as text or message lists, or `chosen_ids` and `rejected_ids`; rename or add it",
            )
    prompt = None if row.get("prompt") is None else _text("prompt", row["prompt"])
    chosen, rejected = _text("chosen", row["chosen"]), _text("rejected", row["rejected"])
    _check_one_form(prompt, chosen, rejected)
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(side, completion, explicit_prompt=bool(prompt))
    return PreferencePair(
        chosen,
        rejected,
        prompt,
        margin,
        _tools(row.get("tools")),
        _template_kwargs(row.get("chat_template_kwargs")),
    )


def check_text(name: str, text: str) -> str:
    """`text` itself; `RowError` (not-utf8) if it holds lone surrogates, which no tokenizer accepts."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                "not-utf8",
                f"`{name}` holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, "
                "which UTF-8 cannot express; write the whole character, or remove the escape",
            ) from None
    return text


def check_messages(name: str, value: Sequence[Any]) -> list[Message]:
    """Messages with known roles and contents, without the None fields that Arrow adds; else `RowError`."""
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _text(name: str, value: Any) -> Text:
    if isinstance(value, str):
        return check_text(name, value)
    if _is_list(value):
        return check_messages(name, list(value))
    raise RowError(
        "wrong-type",
        f"`{name}` ({_short(value)}) is {type(value).__name__}; it must be a string or a list of messages "
        "[{'role': ..., 'content': ...}]; convert the column",
    )


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(
            "wrong-type",
            f"`{name}` ({_short(value)}) is {type(value).__name__}; a message is an object "
            "{'role': ..., 'content': ...}; convert the column",
        )
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise RowError(
            "bad-roles",
            f"`{name}.role` ({_short(role)}) is not one of {', '.join(ROLES)}; "
            + ("add the role" if role is None else "rename it")
            + (" (ShareGPT: `from` -> `role`, `value` -> `content`)" if "from" in value else ""),
        )
    if content is None and not value.get("tool_calls"):
        raise RowError(
            "bad-roles",
            f"`{name}` ({_short(dict(value))}) has neither `content` nor `tool_calls`; add its `content`",
        )
    # A tool call without content has content None, as Arrow makes it: a row is the same from any source.
    message = {key: entry for key, entry in value.items() if entry is not None}
    return {**message, "content": None if content is None else _content(f"{name}.content", content)}


def _content(name: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return check_text(name, content)
    if not _is_list(content):
        raise RowError(
            "wrong-type",
            f"`{name}` ({_short(content)}) is {type(content).__name__}; it must be a string, or a list of "
            "{'type': 'text', 'text': ...}; convert it",
        )
    parts = []
    for index, part in enumerate(content):
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise RowError(
                "wrong-type",
                f"`{name}[{index}]` ({_short(part)}) is not {{'type': 'text', 'text': ...}}; only text can "
                "be scored; remove the part or the row",
            )
        check_text(f"{name}[{index}].text", part["text"])
        parts.append({key: entry for key, entry in part.items() if entry is not None})
    return parts


def _check_one_form(prompt: Text | None, chosen: Text, rejected: Text) -> None:
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    forms = {name: _form_word(text) for name, text in texts.items() if text is not None}
    if len(set(forms.values())) > 1:
        said = ", ".join(f"`{name}` is {word}" for name, word in forms.items())
        raise RowError(
            "mixed-forms",
            f"{said}; a row is all strings or all message lists; write the strings as messages "
            "[{'role': 'user' or 'assistant', 'content': ...}]",
        )


def _check_completion(side: str, completion: Text, *, explicit_prompt: bool) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError(
                "empty-completion",
                f"`{side}` ({completion!r}) is empty; a completion needs text; drop the row",
            )
        return
    if not completion:
        raise RowError(
            "empty-completion", f"`{side}` ([]) has no message; add the assistant's; or drop the row"
        )
    first, last = completion[0]["role"], completion[-1]["role"]
    if last != "assistant":
        raise RowError(
            "bad-roles",
            f"`{side}` ends with a message of role {last!r}; the last message is what is judged and must be "
            "the assistant's; cut the dialogue there or drop the row",
        )
    if explicit_prompt and first != "assistant":
        raise RowError(
            "bad-roles",
            f"`{side}` starts with a message of role {first!r}; with a `prompt`, a completion starts with "
            "the assistant's message; move what comes before it to `prompt`",
        )
    if not completion[-1].get("tool_calls") and not _content_text(completion[-1]["content"]).strip():
        raise RowError(
            "empty-completion",
            f"`{side}[{len(completion) - 1}].content` is empty; the judged message needs text or "
            "`tool_calls`; drop the row",
        )


def _content_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _ids_of(row: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    for chosen, rejected in (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")):
        present = [name for name in (chosen, rejected) if row.get(name) is not None]
        if len(present) == 2:
            if chosen == "chosen_input_ids":
                _warn_legacy_columns()
            return _ids(chosen, row[chosen]), _ids(rejected, row[rejected])
        if present and row.get("chosen") is None and row.get("rejected") is None:
            absent = rejected if present == [chosen] else chosen
            raise RowError(
                f"missing-{absent.partition('_')[0]}",
                f"`{absent}` is missing beside `{present[0]}`; a tokenized pair needs both; add it",
            )
    return None


def _ids(name: str, value: Any) -> list[int]:
    if not _is_list(value) or any(isinstance(i, bool) or not isinstance(i, Integral) or i < 0 for i in value):
        raise RowError(
            "wrong-type",
            f"`{name}` ({_short(value)}) must be a list of token ids, integers from 0; convert the column",
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
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise RowError(
            "bad-margin",
            f"`margin` ({_short(value)}) must be a finite number; correct it, or remove it for no margin",
        )
    return float(value)


def _tools(value: Any) -> list[Any] | None:
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise RowError(
                "bad-tools", f"`tools` ({_short(value)}) is not JSON: {error}; correct it"
            ) from None
    if tools is None:
        return None
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(
            "bad-tools",
            f"`tools` ({_short(value)}) must be a list of tool schemas (objects), or that list as a JSON "
            "string; wrap a single tool in a list",
        )
    return list(tools)


def _template_kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(
            "bad-template-kwargs",
            f"`chat_template_kwargs` ({_short(value)}) must be an object of template variables, such as "
            "{'enable_thinking': false}; convert the column",
        )
    reserved = sorted(set(value) & set(_NOT_FOR_TEMPLATE))
    if reserved:
        raise RowError(
            "bad-template-kwargs",
            f"`chat_template_kwargs.{reserved[0]}` ({_short(value[reserved[0]])}) is no template variable: "
            "it would change how the text becomes ids; remove it",
        )
    return {str(key): entry for key, entry in value.items() if entry is not None}


def _is_list(value: Any) -> bool:
    """Lists, tuples and the arrays that Arrow and numpy hand out; not strings, bytes or objects."""
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def _form_word(text: Text) -> str:
    return "a string" if isinstance(text, str) else "a message list"


def _short(value: Any, limit: int = 60) -> str:
    shown = repr(value[:limit] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
