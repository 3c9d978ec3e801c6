"""Run files: one TOML file, and `key=value` words after it, make a `Run`.

Sections are [model] (with [model.lora]), [data], [reward], [cluster] and [serve]; a bare key in an override
is a [reward] key. An unknown section or key is an error that names the nearest, and all problems are told at
once. The word "none" stands for TOML's missing null. Relative paths mean what they mean to the shell:
relative to the current directory, not to the run file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from rayrm.config import ClusterConfig, DataConfig, ModelConfig, RewardConfig, ServeConfig
from rayrm.errors import ConfigError
from rayrm.rules import SAME
from rayrm.settings import field_names, nearest
from rayrm.unsupported import NOT_HONOURED
from rayrm.urls import masked

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reward": RewardConfig,
    "cluster": ClusterConfig,
    "serve": ServeConfig,
}
"""A run file's sections and what each becomes."""


@dataclasses.dataclass
class Run:
    """All a run is told; what `rayrm config` prints and `run.toml` in a run directory holds."""

    model: ModelConfig
    """[model]"""
    data: DataConfig
    """[data]"""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    """[reward]"""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    """[cluster]"""
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    """[serve]"""


def read_run(path: str | Path | None, overrides: Sequence[str] = ()) -> Run:
    """Read a run file and put `overrides` over it.

    Args:
        path: a TOML file; None: the overrides say everything.
        overrides: words such as `learning_rate=2e-6`, `cluster.num_workers=8`, `data.train=pairs.jsonl`.
            A value is read as TOML where it parses, else as a string.

    Raises:
        ConfigError: the file is missing or no TOML, or a section, key or value is wrong.
    """
    tables = {} if path is None else _read_toml(Path(path))
    for word in overrides:
        _override(tables, word)
    origin = "the command line" if path is None else str(path)
    return _build(tables, origin)


def dump_run(run: Run) -> str:
    """The resolved run as TOML; `read_run` of it gives an equal run, but for credentials in URLs (`***`).

    Settings that are None are left out, or written "none" where None is not the default; so are None values
    inside tables. Raises ConfigError for a value that TOML cannot hold.
    """
    tables = {}
    for section in SECTIONS:
        config = getattr(run, section)
        table = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value is None and field.default is not None:
                value = "none"
            if value is not None:
                table[field.name] = _storable(value, f"{section}.{field.name}")
        tables[section] = table
    return tomli_w.dumps(tables)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"run file `{path}` does not exist (looked in {Path.cwd()}). Type the path of a TOML file."
        ) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"run file `{path}` cannot be read: {problem}. Give a readable UTF-8 file."
        ) from None
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(
            f'run file `{path}` is no TOML: {problem}. Strings need quotes: name = "x".'
        ) from None


def _value(text: str) -> Any:
    """`text` as a TOML value where it is one (but no date), else as it stands."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _override(tables: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override `{word}` must be key=value. Type for example `learning_rate=2e-6`.")
    path = key.strip().split(".")
    if len(path) == 1:
        _check_bare_key(path[0], word)
        path = ["reward", *path]
    elif path[0] in field_names(
        RewardConfig
    ):  # a table of [reward], as in `lr_scheduler_kwargs.num_cycles=2`
        path = ["reward", *path]
    elif path[0] not in SECTIONS:
        raise ConfigError(f"override `{word}`: `{path[0]}` is no section.{_sections(path[0])}")
    table = tables
    for name in path[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = table[name] = {}
        table = inner
    table[path[-1]] = _value(text)


def _check_bare_key(key: str, word: str) -> None:
    if key in SECTIONS:
        known = ", ".join(f"`{key}.{name}`" for name in field_names(SECTIONS[key])[:3])
        raise ConfigError(f"override `{word}`: `{key}` is a section. Type a key of it: {known} ...")
    homes = [section for section, owner in SECTIONS.items() if key in field_names(owner)]
    if homes and "reward" not in homes:
        keys = " or ".join(f"`{home}.{word}`" for home in homes)
        raise ConfigError(f"override `{word}`: `{key}` is no [reward] key. Type {keys}.")


def _sections(name: str) -> str:
    return nearest(name, SECTIONS) or f" Sections are {', '.join(SECTIONS)}."


def _build(tables: Mapping[str, Any], origin: str) -> Run:
    problems = []
    configs: dict[str, Any] = {}
    for section in tables:
        if section not in SECTIONS:
            problems.append(_misplaced(section))
    for section, owner in SECTIONS.items():
        table = tables.get(section, {})
        if not isinstance(table, dict):
            problems.append(f"`{section}` ({table!r}) must be a section. Type `[{section}]`, then its keys.")
            continue
        try:
            configs[section] = owner(**table)
        except ConfigError as problem:
            problems += [f"[{section}] {line}" for line in str(problem).splitlines()]
        else:
            if section == "data" and configs[section].train is None:
                problems.append("[data] `train` is missing: a run needs it.")
    if problems:
        raise ConfigError(
            "\n".join([f"{origin}:", *problems]) if len(problems) > 1 else f"{origin}: {problems[0]}"
        )
    return Run(**configs)


def _misplaced(name: str) -> str:
    """What to say of a top-level name that is no section."""
    homes = [section for section, owner in SECTIONS.items() if name in field_names(owner)]
    if name in NOT_HONOURED or name in SAME:
        homes = ["reward"]
    if homes:
        return f"`{name}` stands outside its section. Put it under [{homes[0]}]."
    return f"`[{name}]` is no section.{_sections(name)}"


def _storable(value: Any, key: str) -> Any:
    """`value` in TOML's types; a torch dtype becomes its name, which transformers reads back."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _storable(v, f"{key}.{k}") for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_storable(item, key) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            field.name: _storable(getattr(value, field.name), f"{key}.{field.name}")
            for field in dataclasses.fields(value)
            if getattr(value, field.name) is not None
        }
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    raise ConfigError(
        f"`{key}` ({value!r}) cannot be written to a run file: give a string, number, list or table."
    )
