"""What the HTTP routes share: strict JSON, the texts in a body, and `WireShape`, one shape on the wire.

A body is refused, with a sentence, for anything that two readers could read differently: duplicate keys, NaN,
numbers beyond a float, half characters, other encodings than UTF-8, nesting beyond 64. So whatever passes can
go through a chat template and a tokenizer, and out again as JSON. No Ray, no torch.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError
from rayrm.serve.request import (
    Refused,
    Scorable,
    ScoreRequest,
    ScoreResult,
    id_scorable,
    template_arguments,
    text_scorable,
)
from rayrm.settings import nearest

# Words with a part in a score, of this service or of other servers, that a shape may not have.
_OWN_WORDS = ("model", "version", "truncation")
_OTHER_NUMBERS = ("use_activation", "activation", "softmax", "normalize")
_OTHER_TEXTS = ("tools", "chat_template", "chat_template_kwargs", "instruction", "lora_path", "image_data")

MAX_DEPTH = 64
"""Nested lists and objects in a body. A tool's JSON schema has about 10, and a template that prints one
recurses once for each."""

TOLERANT = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)
"""Of shapes that other servers define: their clients send fields that have no part in a score."""

EXACT = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_PROBLEMS = 3

# Reading ten million empty lists takes as long as scoring thousands of texts. A body of the largest size that
# is all source code has about this many, which count although they stand inside texts.
_MAX_OPENINGS = 2_000_000

# Checked by `read_texts` and not by pydantic, whose unions answer with one line for each branch and place.
Texts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}, "title": "Token ids"},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
Strings = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "string"}})]
Messages = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}})]


@dataclass(frozen=True, slots=True)
class WireShape:
    """One request shape and its answer. `told_by`: fields of which a body of this shape has exactly one.

    `to_request` raises ScoreError for what the shape can say and a reward model cannot do; `to_answer` gives
    the body of the answer from the request's body and the result. `examples`: bodies that work, by name; the
    first for models of both text forms. `each_alone`: fields whose texts are refused each by itself.
    """

    title: str
    description: str
    told_by: tuple[str, ...]
    body: type[BaseModel]
    to_request: Callable[[Any], ScoreRequest]
    to_answer: Callable[[Any, ScoreResult], Any]
    examples: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    each_alone: tuple[str, ...] = ()

    def parse(self, fields: Mapping[str, Any]) -> BaseModel:
        """The body as this shape's model. Raises ScoreError naming the field, the rule and the fix."""
        _refuse_other_words(fields, self)
        try:
            return self.body.model_validate(fields)
        except ValidationError as problems:
            raise ScoreError(_complaint(problems, self)) from None

    def in_callers_words(self, message: str, body: BaseModel, count: int) -> str:
        """What a model says of input `place` of `count`, by the name and the means that the caller has."""
        found = re.match(r"input (\d+)(?: of \d+)?\b", message)
        if found is None:
            return message
        said = f"`{self.name_of(vars(body), int(found[1]), count)}`{message[found.end() :]}"
        own = "truncation" in self.body.model_fields
        return said.replace(
            'pass truncation="left"',
            'send `truncation`: "left"' if own else "add ?truncation=left to the URL",
        )

    def name_of(self, fields: Mapping[str, Any], place: int, count: int) -> str:
        """What the caller calls input `place` of the `count` that a body with these fields became."""
        name = next(name for name in self.told_by if fields.get(name) is not None)
        several = isinstance(fields[name], list) and len(fields[name]) == count
        return f"{name}[{place}]" if several else name


def choose_shape(shapes: Sequence[WireShape], fields: Mapping[str, Any]) -> WireShape:
    """The only one of `shapes` that the fields fit. Raises ScoreError where none or several do."""
    if len(shapes) == 1:
        return shapes[0]
    fitting = [shape for shape in shapes if any(name in fields for name in shape.told_by)]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{_one_of(shape.told_by)} ({shape.title})" for shape in shapes)
    raise ScoreError(
        f"the body holds {'fields of several protocols' if fitting else 'no text'}: this path takes "
        f"either of {known}. Send the fields of one."
    )


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ScoreError where it is none, or one that readers disagree about."""
    if not body.strip():
        raise ScoreError("the body is empty: it must be a JSON object. Send the one that /docs shows.")
    if body.count(b"[") + body.count(b"{") > _MAX_OPENINGS:
        raise ScoreError(
            f"the body has more than {_MAX_OPENINGS} opening brackets. Send its texts in several requests."
        )
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise ScoreError(
            f"byte {problem.start} of the body is not UTF-8, in which JSON is written. Encode it as UTF-8."
        ) from None
    except json.JSONDecodeError as problem:
        raise ScoreError(f"the body is not valid JSON: {problem}. Write it with a JSON library.") from None
    except ScoreError:  # of the hooks below; a ValueError too
        raise
    except RecursionError:
        _refuse_depth()
    except ValueError:
        raise ScoreError(
            "the body holds a number of thousands of digits; token ids have at most 10. Remove it."
        ) from None
    if not isinstance(value, dict):
        raise ScoreError(f"the body is a JSON {_kind(value)} and must be an object {{...}}. /docs shows one.")
    _check_depth(value)
    return value


def check_characters(body: bytes, fields: Mapping[str, Any], but: Sequence[str] = ()) -> None:
    """Raise ScoreError naming the field, if not one of `but`, that holds half of a surrogate pair."""
    if not _SURROGATE_ESCAPE.search(body):
        return
    for name, value in fields.items():
        parts = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, part in parts if name not in but else ():
            if not _is_whole({name: part}):
                where = ascii(name)[1:-1] + ("" if place is None else f"[{place}]")
                raise ScoreError(
                    f"`{where}` holds half of a surrogate pair (an escape between \\ud800 and \\udfff "
                    "without its other half), which UTF-8 cannot express. Write the whole character."
                )


def read_texts(name: str, value: Any) -> list[Scorable]:
    """A text, several, the token ids of one, or of several -> inputs; texts are rendered already.

    Raises ScoreError naming the place of what is none of these.
    """
    many = [value] if isinstance(value, str) else value
    if not isinstance(many, list) or not many:
        raise ScoreError(
            f"`{name}` ({reprlib.repr(value)}) must be a text, a list of texts, or token ids; at least one."
        )
    if isinstance(many[0], str):
        return whole_texts(name, many)
    return read_ids(name, [many] if type(many[0]) is int else many)


def whole_texts(name: str, value: Any, *, complete_turn: bool = False) -> list[Scorable]:
    """Strings -> inputs that are the chat template's output, or plain text. Raises ScoreError otherwise.

    `complete_turn`: as in `TextInput`, for what a policy wrote up to its stop token.
    """
    return [
        TextInput(None, text, rendered=True, complete_turn=complete_turn)
        for text in read_strings(name, value)
    ]


def read_strings(name: str, value: Any) -> list[str]:
    """`value` itself if it is a list of strings. Raises ScoreError naming the first that is none."""
    if not isinstance(value, list):
        raise ScoreError(f"`{name}` ({reprlib.repr(value)}) must be a list of strings. Send [...].")
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise ScoreError(
                f"`{name}[{place}]` ({reprlib.repr(text)}) must be a string, as `{name}` is a list of "
                "strings. Render messages with the chat template, or send them to /v1/score."
            )
    return value


def read_ids(name: str, value: Any) -> list[Scorable]:
    """Lists of token ids -> int32 arrays, with `Refused` in the place of what is none."""
    if not isinstance(value, list):
        raise ScoreError(f"`{name}` ({reprlib.repr(value)}) must be a list of lists of token ids.")
    return [_ids(f"{name}[{place}]", ids) for place, ids in enumerate(value)]


def _ids(name: str, value: Any) -> Scorable:
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        return Refused(
            f"`{name}` ({reprlib.repr(value)}) must be a list of token ids, whole numbers. Send "
            "[tokenizer(text).input_ids, ...], or texts alone."
        )
    return id_scorable(name, value)


def dialogue_input(
    name: str, messages: Any, tools: Any, chat_template_kwargs: Mapping[str, Any] | None
) -> Scorable:
    """One dialogue whose last message is what is judged. Raises ScoreError unless it is a message list."""
    check_template_names(chat_template_kwargs)
    shown, variables = template_arguments(tools, chat_template_kwargs)
    return text_scorable(name, name, TextInput(None, read_messages(name, messages), shown, variables))


def read_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """`value` itself if it is a list of objects, whatever they hold. Raises ScoreError otherwise."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ScoreError(
            f"`{name}` ({reprlib.repr(value)}) must be a list of messages "
            "[{'role': 'user', 'content': ...}, {'role': 'assistant', 'content': ...}]."
        )
    return value


def check_template_names(chat_template_kwargs: Mapping[str, Any] | None) -> None:
    """Raise ScoreError for names that are the renderer's own, not the template's variables.

    A template from a stranger is a program that runs here, and a generation prompt is text that the model was
    never trained to score.
    """
    for name in chat_template_kwargs or {}:
        if name in _RENDERERS_OWN:
            raise ScoreError(
                f"`chat_template_kwargs.{name}` is no variable of the chat template: the service renders "
                "as the model was trained. Remove it, or send text that you rendered (`rendered`: true)."
            )


def refuse_activation(name: str, value: bool | None) -> None:
    """Raise ScoreError where a caller asks for a sigmoid or softmax: it hides how far scores are apart."""
    if value:
        raise ScoreError(
            f"`{name}` (true) asks for a sigmoid or softmax; a reward is the model's own output and is never "
            f"squashed. Send `{name}`: false, and apply one yourself where you want it."
        )


def finite_or_null(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: a text without a score has null."""
    return [value if math.isfinite(value) else None for value in values]


def _complaint(problems: ValidationError, shape: WireShape) -> str:
    lines = []
    for problem in problems.errors(include_url=False)[:_MAX_PROBLEMS]:
        name = ".".join(str(part) for part in problem["loc"])[:60]
        if problem["type"] == "missing":
            lines.append(f"`{name}` is missing: {shape.title} needs it.")
        elif problem["type"] == "extra_forbidden":
            known = nearest(name, shape.body.model_fields)
            lines.append(f"`{name}` is no field of {shape.title}.{known or ' Remove it.'}")
        else:
            rule = problem["msg"].removeprefix("Input ")
            lines.append(f"`{name}` ({reprlib.repr(problem['input'])}) {rule}.")
    return " ".join(lines)


def _refuse_other_words(fields: Mapping[str, Any], shape: WireShape) -> None:
    """Other servers' clients send what has no part in a score; what has one is honoured or refused."""
    if shape.body.model_config.get("extra") == "forbid":
        return
    known = shape.body.model_fields
    for name in _OWN_WORDS:
        if name not in known and fields.get(name) is not None:
            raise ScoreError(f"`{name}` is no field of {shape.title}. Send it in the URL: ?{name}=...")
    for name in _OTHER_NUMBERS:
        if name not in known:
            refuse_activation(name, bool(fields.get(name)))
    for name in _OTHER_TEXTS:
        if name not in known and fields.get(name):
            raise ScoreError(
                f"`{name}` would change what is scored, and {shape.title} does not take it here. Remove it, "
                "or send /v1/score what the model is to read."
            )


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _kind(value: Any) -> str:
    kinds = {list: "array", str: "string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "number")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ScoreError(f"an object of the body has the key {reprlib.repr(twice)} twice. Keep one.")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ScoreError(
        f"the body holds {name}, which JSON does not have. Send a number, or leave the field out."
    )


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ScoreError(f"the body holds the number {reprlib.repr(text)}, too large for a float. Remove it.")
    return number


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    _refuse_depth()


def _refuse_depth() -> NoReturn:
    raise ScoreError(f"the body nests lists and objects deeper than {MAX_DEPTH}. Flatten it.")


def _is_whole(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
)

_RENDERERS_OWN = frozenset(
    {
        "self", "conversation", "messages", "tools", "chat_template", "add_generation_prompt",
        "continue_final_message", "sanitize_control_tokens", "tokenize", "padding", "truncation",
        "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
