"""`@settings`: a dataclass whose fields are coerced and checked, and whose errors are sentences.

It is pydantic's dataclass with three differences: every problem is one line "`field` (value): rule", an
unknown name is an error that names the nearest one, and what is raised is a `ConfigError`. Strings are
coerced (`learning_rate="2e-6"`), so that command lines and TOML files need no types of their own.
A class may define `__adopt_names__(names, owner)` to translate or refuse names before they are checked.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from rayrm.errors import ConfigError
from rayrm.urls import masked

_T = TypeVar("_T")
_NONE_WORDS = ("none", "null")


def none_word(value: Any) -> Any:
    """TOML and command lines have no null: the word `none` stands for it."""
    return None if isinstance(value, str) and value.lower() in _NONE_WORDS else value


def _no_names(value: Any) -> Any:
    return [] if value is None else value


def _name_list(value: Any) -> Any:
    """Names in a list, or in one word with commas between them; none for None."""
    if isinstance(value, str):
        return [] if none_word(value) is None else [name.strip() for name in value.split(",")]
    return _no_names(value)


def switch_word(value: Any) -> Any:
    """A switch that may also be a path: True -> "true"; False, "false" and "none" -> None."""
    word = str(value).lower() if isinstance(value, bool | str) else value
    return {"true": "true", "false": None, "none": None, "null": None}.get(word, value)


def json_value(value: Any) -> Any:
    """A table or a list given as JSON text, as transformers' command lines write it."""
    value = none_word(value)
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as problem:
        raise ValueError(f"is not valid JSON: {problem}") from None


def _table(value: Any) -> Any:
    value = json_value(value)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a table, or one as JSON text such as '{\"name\": 1}'")
    return value


def _named_model(value: str) -> str:
    if not value.strip():
        raise ValueError(f"`name` ({value!r}): names no model. Type a directory or a hub name.")
    return value


ModelName = Annotated[str, AfterValidator(_named_model)]
OptionalCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(none_word)]
OptionalSeed = Annotated[Annotated[int, Field(ge=0, lt=2**32)] | None, BeforeValidator(none_word)]
OptionalNonNegativeFloat = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(none_word)]
Names = Annotated[str | list[str], BeforeValidator(_no_names)]
NameList = Annotated[list[str], BeforeValidator(_name_list)]
OptionalBool = Annotated[bool | None, BeforeValidator(none_word)]
if TYPE_CHECKING:
    OptionalTable = dict[str, Any] | None
else:
    # `str`: transformers' command lines hand text to a field whose type has it, and to a table's not.
    OptionalTable = Annotated[dict[str, Any] | str | None, BeforeValidator(_table)]
OptionalTableOrPath = Annotated[dict[str, Any] | str | None, BeforeValidator(json_value)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean `x`?" for the known name most like `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def field_names(owner: type) -> list[str]:
    """The settings that `owner` takes, in the order of their definition."""
    return [field.name for field in dataclasses.fields(owner)]


def readable(problems: ValidationError, owner: type) -> str:
    """One line for each problem: "`field` (value): rule"."""
    lines: list[str] = []
    rules: dict[str, list[str]] = {}  # a field that may have several types breaks a rule of each
    for problem in problems.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"] if not _names_a_type(str(part)))
        rule = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"`{path}` is missing: {owner.__name__} needs it.")
        elif problem["type"] == "value_error" and (not path or rule.startswith("`")):
            lines.append(rule)
        elif problem["type"] == "unexpected_positional_argument":
            lines.append(f"{problem['input']!r}: {owner.__name__} takes this by name only.")
        else:
            rule = (rule[0].lower() + rule[1:]).removeprefix("input ")
            rules.setdefault(f"`{path}` ({problem['input']!r})", []).append(rule)
    lines += [f"{field}: {', or '.join(broken)}." for field, broken in rules.items()]
    return masked("\n".join(lines))


def _names_a_type(part: str) -> bool:
    """Whether a part of pydantic's path names a branch of a union, not a field."""
    return part in ("str", "int", "float", "bool") or "[" in part or part.startswith("function-")


def _plain(value: Any) -> Any:
    """The value of an enumeration's member (`SchedulerType.COSINE` -> "cosine"), a path's text, anything else
    unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.value if isinstance(value, enum.Enum) else value


def _check_names(owner: type, given: Any) -> Any:
    """Runs before the fields are read: adopt foreign names, refuse unknown ones."""
    if isinstance(given, ArgsKwargs):
        args, names = given.args, dict(given.kwargs or {})
    elif isinstance(given, Mapping):
        args, names = (), dict(given)
    else:
        return given
    adopt = getattr(owner, "__adopt_names__", None)
    if adopt is not None:
        names = adopt(names)
    known = field_names(owner)
    unknown = [
        f"`{name}` is no setting of {owner.__name__}.{nearest(name, known)}"
        for name in names
        if name not in known
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    return ArgsKwargs(tuple(map(_plain, args)), {name: _plain(value) for name, value in names.items()})


@dataclass_transform(field_specifiers=(dataclasses.field, Field))
def settings(cls: type[_T]) -> type[_T]:
    """Make `cls` a checked dataclass; see the module's docstring."""
    return _checked(cls, frozen=False)


@dataclass_transform(field_specifiers=(dataclasses.field, Field), frozen_default=True)
def frozen_settings(cls: type[_T]) -> type[_T]:
    """As `settings`, and its fields cannot be set afterwards."""
    return _checked(cls, frozen=True)


def _checked(cls: type[_T], *, frozen: bool) -> type[_T]:
    name_check: Any = classmethod(_check_names)
    cls._check_names = model_validator(mode="before")(name_check)  # type: ignore[attr-defined]
    config = ConfigDict(
        extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, arbitrary_types_allowed=True
    )
    made = pydantic_dataclass(config=config, frozen=frozen)(cls)
    unchecked_init = made.__init__

    @functools.wraps(unchecked_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            unchecked_init(self, *args, **kwargs)
        except ValidationError as problems:
            raise ConfigError(readable(problems, made)) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made  # type: ignore[return-value]
