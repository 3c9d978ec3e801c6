"""What a prompt, a completion or a message may be: each check gives the value back, or raises `RowError`.

Pure: no tokenizer, no torch, no ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayrm.errors import RowError

Message = dict[str, Any]
Text = str | list[Message]

_TOOLS = ("tool", "function", "ipython")
_NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def answer_to(prompt: Text, text: str) -> Text:
    """An answer in the form of its prompt: text, or the assistant's one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def parse_text(name: str, value: Any) -> Text:
    """A string or messages, whichever `value` is; `RowError` (wrong-type) for anything else."""
    if isinstance(value, str):
        return check_text(name, value)
    if is_list(value):
        return check_messages(name, list(value))
    raise RowError(
        "wrong-type",
        f"`{name}` ({shown(value)}) is {type(value).__name__}; it must be a string or a list of messages "
        "[{'role': ..., 'content': ...}]; convert it",
    )


def check_only_text(row: Mapping[str, Any]) -> None:
    """`RowError` (not-text) if a row comes with images, videos or sound, which no reward model here reads."""
    for name in _NOT_TEXT:
        value = row.get(name)
        if value is not None and not (is_list(value) and len(value) == 0):
            raise RowError(
                "not-text",
                f"the row has `{name}` ({type(value).__name__}), and only text can be scored; leave the row "
                "out, or remove the column if the answers can be judged without it",
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


def check_one_form(texts: Mapping[str, Text | None]) -> None:
    """`RowError` (mixed-forms) if some of the named texts are strings and others messages."""
    forms = {name: _form_word(text) for name, text in texts.items() if text is not None}
    if len(set(forms.values())) > 1:
        said = ", ".join(f"`{name}` is {word}" for name, word in forms.items())
        raise RowError(
            "mixed-forms",
            f"{said}; a row is all strings or all message lists; write the strings as messages "
            "[{'role': 'user' or 'assistant', 'content': ...}]",
        )


def check_completion(side: str, completion: Text, *, explicit_prompt: bool) -> None:
    """`RowError` (empty-completion, bad-roles) if there is nothing to judge, or it is not the assistant's."""
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError(
                "empty-completion",
                f"`{side}` ({completion!r}) is empty; a completion needs text; drop the row",
            )
        return
    check_roles(side, completion, explicit_prompt=explicit_prompt)
    if not completion[-1].get("tool_calls") and not _content_text(completion[-1]["content"]).strip():
        raise RowError(
            "empty-completion",
            f"`{side}[{len(completion) - 1}].content` is empty; the judged message needs text or "
            "`tool_calls`; drop the row",
        )


def check_roles(
    side: str, completion: Sequence[Message], *, explicit_prompt: bool, may_await: bool = False
) -> None:
    """`RowError` (empty-completion, bad-roles) unless the message that is judged is the assistant's.

    `may_await`: results of the tools that it called may follow, as in a rollout that ends before it goes on.
    """
    if not completion:
        raise RowError(
            "empty-completion", f"`{side}` ([]) has no message; add the assistant's, or leave it out"
        )
    first, last = completion[0]["role"], completion[-1]["role"]
    if may_await:
        last = next((m["role"] for m in reversed(completion) if m["role"] not in _TOOLS), last)
    if last != "assistant":
        raise RowError(
            "bad-roles",
            f"`{side}` ends with a message of role {last!r}; the last message is what is judged and must be "
            "the assistant's; cut the dialogue there, or leave it out",
        )
    if explicit_prompt and first != "assistant":
        raise RowError(
            "bad-roles",
            f"`{side}` starts with a message of role {first!r}; with a `prompt`, a completion starts with "
            "the assistant's message; move what comes before it to `prompt`",
        )


def _content_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, (dict, Mapping)):  # a dict is known at once, a Mapping is looked up
        raise RowError(
            "wrong-type",
            f"`{name}` ({shown(value)}) is {type(value).__name__}; a message is an object "
            "{'role': ..., 'content': ...}; convert it",
        )
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise RowError(
            "bad-roles",
            f"`{name}.role` ({shown(role)}) is not one of {', '.join(ROLES)}; "
            + ("add the role" if role is None else "rename it")
            + (" (ShareGPT: `from` -> `role`, `value` -> `content`)" if "from" in value else ""),
        )
    if content is None and not value.get("tool_calls"):
        raise RowError(
            "bad-roles",
            f"`{name}` ({shown(dict(value))}) has neither `content` nor `tool_calls`; add its `content`",
        )
    # A tool call without content has content None, as Arrow makes it: a row is the same from any source.
    message = {key: entry for key, entry in value.items() if entry is not None}
    return {**message, "content": None if content is None else _content(f"{name}.content", content)}


def _content(name: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return check_text(name, content)
    if not is_list(content):
        raise RowError(
            "wrong-type",
            f"`{name}` ({shown(content)}) is {type(content).__name__}; it must be a string, or a list of "
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
                f"`{name}[{index}]` ({shown(part)}) is not {{'type': 'text', 'text': ...}}; only text can "
                "be scored; remove the part or the row",
            )
        check_text(f"{name}[{index}].text", part["text"])
        parts.append({key: entry for key, entry in part.items() if entry is not None})
    return parts


def is_list(value: Any) -> bool:
    """Lists, tuples and the arrays that Arrow and numpy hand out; not strings, bytes or objects."""
    if isinstance(value, list):  # most are: asking what else it is takes longer
        return True
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def _form_word(text: Text) -> str:
    return "a string" if isinstance(text, str) else "a message list"


def shown(value: Any, limit: int = 60) -> str:
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
