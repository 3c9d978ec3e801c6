"""What one HTTP request may hold; beyond it the answer is 413. A body's bytes are `http_guard.py`'s."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError
from rayrm.serve.request import Refused, Scorable, ScoreRequest
from rayrm.serve.wire import WireShape


@dataclass(frozen=True)
class HttpLimits:
    """What one request may hold; beyond it the answer is 413 (408 for the time)."""

    max_body_bytes: int = 32 * 2**20
    """Also the most characters after repetition: a prompt or tools count once for each text they go into."""
    max_texts: int = 4096
    max_characters: int = 1_000_000
    """Of one text with its prompt, tools and template variables; or its token ids."""
    body_timeout_s: float = 60.0
    """Seconds in which the whole body must have come."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(
                    f"`{field.name}` ({getattr(self, field.name)}) must be above 0: nothing could be sent."
                )


class TooLargeError(Exception):
    """A request beyond a limit; its message is the answer's."""


def check_lengths(fields: Mapping[str, Any], shape: WireShape, limits: HttpLimits) -> None:
    """Before anything is made of them: a body may hold ten million empty lists."""
    for name in shape.body.model_fields.keys() & fields.keys():
        value = fields[name]
        if isinstance(value, list) and value:
            limit = limits.max_characters if isinstance(value[0], int) else limits.max_texts
            if len(value) > limit:
                raise TooLargeError(
                    f"`{name}` has {len(value)} entries, the limit of this service is {limit}. Send them in "
                    "several requests."
                )


def within_limits(wanted: ScoreRequest, limits: HttpLimits, name: Callable[[int], str]) -> list[Scorable]:
    """The inputs; of a partial request those that are too large are refused, else they are its error."""
    inputs = list(wanted.inputs)
    if len(inputs) > limits.max_texts:
        raise TooLargeError(
            f"the request has {len(inputs)} texts, the limit of this service is {limits.max_texts}. Send "
            "them in several requests."
        )
    sizes: dict[int, int] = {}  # of what texts have in common, by identity
    total = 0
    for place, entry in enumerate(inputs):
        size = _characters(entry, sizes)
        if size > limits.max_characters:
            said = (
                f"`{name(place)}`, its prompt and its tools have {size} characters (or ids) together, the "
                f"limit of this service is {limits.max_characters}. Shorten them."
            )
            if not wanted.partial:
                raise TooLargeError(said)
            inputs[place], size = Refused(said), 0
        total += size
        if total > limits.max_body_bytes:
            raise TooLargeError(
                f"the request's texts have more than {limits.max_body_bytes} characters, counting a "
                "prompt and tools for each text. Send them in several requests."
            )
    return inputs


def _characters(entry: Scorable, sizes: dict[int, int]) -> int:
    if not isinstance(entry, TextInput):
        return 0 if isinstance(entry, Refused) else len(entry)
    parts = (entry.prompt, entry.completion, entry.tools, entry.chat_template_kwargs or None)
    size = 0
    for part in parts:
        if isinstance(part, str):
            size += len(part)
        elif part is not None:
            if id(part) not in sizes:
                sizes[id(part)] = len(json.dumps(part, ensure_ascii=False))
            size += sizes[id(part)]
    return size
