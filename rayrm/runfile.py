"""Run files: one TOML file, and `key=value` words after it, make a `Run`.

Sections are [model] (with [model.lora]), [data], [reward], [cluster] and [serve]; a bare key in an override
is a [reward] key. An unknown section or key is an error that names the nearest, and all problems are told at
once. The word "none" stands for TOML's missing null. Relative paths mean what they mean to the shell:
relative to the current directory, not to the run file. Jobs whose files have other sections are read and
written alike, by `read_tables` and `dump_tables`.
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
from rayrm.settings import field_names, nearest, none_word
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
_SECRETS = ("token", "use_auth_token", "hub_token")
"""In tables: arguments that open gated repositories."""


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
    return Run(**read_tables(path, overrides, SECTIONS, needs={"data": ("train",)}))


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """A command's words: the run file (None: there is none) and the overrides."""
    if words and "=" not in words[0]:
        return words[0], list(words[1:])
    return None, list(words)


def split_settings(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Words of which some are overrides of `[reward]` (and no file's path): the others, and their settings.

    Raises:
        ConfigError: an override that has no such form, as in `read_run`.
    """
    known = field_names(RewardConfig)
    others: list[str] = []
    tables: dict[str, Any] = {}
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and key.strip().removeprefix("reward.") in known and not Path(word).exists():
            _override(tables, word, {"reward": RewardConfig}, "reward")
        else:
            others.append(word)
    return others, tables.get("reward", {})


def sections_of(path: str | Path | None) -> set[str]:
    """The sections that a TOML file has; none of no file. Raises ConfigError for what is no TOML."""
    return set() if path is None else set(read_toml(Path(path)))


def read_tables(
    path: str | Path | None,
    overrides: Sequence[str],
    sections: Mapping[str, type],
    *,
    bare: str = "reward",
    needs: Mapping[str, Sequence[str]] = {},
) -> dict[str, Any]:
    """Read a file of these `sections` and put `overrides` over it, as `read_run` does.

    Args:
        sections: of each name the settings class that its table becomes; one that the file leaves out has
            its defaults.
        bare: the section of overrides that name none (`learning_rate=2e-6`).
        needs: by section, keys that this kind of file must give though their default is None.

    Returns:
        the settings of every section, by its name.

    Raises:
        ConfigError: as `read_run`, all problems at once.
    """
    tables = {} if path is None else read_toml(Path(path))
    origin = "the command line" if path is None else str(path)
    return make_tables(tables, overrides, sections, origin=origin, bare=bare, needs=needs)


def make_tables(
    tables: dict[str, Any],
    overrides: Sequence[str],
    sections: Mapping[str, type],
    *,
    origin: str,
    bare: str = "reward",
    needs: Mapping[str, Sequence[str]] = {},
) -> dict[str, Any]:
    """As `read_tables`, of a file that was read before; `overrides` change `tables`. `origin`: its name."""
    for word in overrides:
        _override(tables, word, sections, bare)
    return _build(tables, origin, sections, needs)


def dump_run(run: Run) -> str:
    """The resolved run as TOML; `read_run` of it gives an equal run, but for credentials in URLs (`***`).

    Settings that are None are left out, or written "none" where None is not the default; so are None values
    inside tables, and secrets (fields without a repr, and tokens in tables). Raises ConfigError for a value
    that TOML cannot hold.
    """
    return dump_tables({section: getattr(run, section) for section in SECTIONS})


def dump_tables(configs: Mapping[str, Any]) -> str:
    """The settings of each section as TOML, which `read_tables` reads back; see `dump_run`."""
    tables = {}
    for section, config in configs.items():
        table = {}
        for field in dataclasses.fields(config):
            if not field.repr:  # a secret
                continue
            value = getattr(config, field.name)
            if value is None and field.default is not None:
                value = "none"
            if value is not None:
                table[field.name] = _storable(value, f"{section}.{field.name}")
        tables[section] = table
    return tomli_w.dumps(tables)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where there is none."""
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


def _override(tables: dict[str, Any], word: str, sections: Mapping[str, type], bare: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override `{word}` must be key=value. Type for example `learning_rate=2e-6`.")
    path = key.strip().split(".")
    if len(path) == 1:
        _check_bare_key(path[0], word, sections, bare)
        path = [bare, *path]
    elif path[0] in field_names(sections[bare]):  # a table, as in `lr_scheduler_kwargs.num_cycles=2`
        path = [bare, *path]
    elif path[0] not in sections:
        raise ConfigError(f"override `{word}`: `{path[0]}` is no section.{_sections(path[0], sections)}")
    table = tables
    for name in path[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            if none_word(inner) is not None:
                raise ConfigError(
                    f"override `{word}`: `{name}` is {inner!r}, which has no keys. Change it there, or leave "
                    "one of the two out."
                )
            inner = table[name] = {}
        table = inner
    table[path[-1]] = _value(text)


def _check_bare_key(key: str, word: str, sections: Mapping[str, type], bare: str) -> None:
    # A section may be named as a key of the bare one is; what follows it says which is meant.
    if key in sections and key not in field_names(sections[bare]):
        known = ", ".join(f"`{key}.{name}`" for name in field_names(sections[key])[:3])
        raise ConfigError(f"override `{word}`: `{key}` is a section. Type a key of it: {known} ...")
    homes = [section for section, owner in sections.items() if key in field_names(owner)]
    if homes and bare not in homes:
        keys = " or ".join(f"`{home}.{word}`" for home in homes)
        raise ConfigError(f"override `{word}`: `{key}` is no [{bare}] key. Type {keys}.")


def _sections(name: str, sections: Mapping[str, type]) -> str:
    return nearest(name, sections) or f" Sections are {', '.join(sections)}."


def _build(
    tables: Mapping[str, Any],
    origin: str,
    sections: Mapping[str, type],
    needs: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    problems = []
    configs: dict[str, Any] = {}
    for section in tables:
        if section not in sections:
            problems.append(_misplaced(section, sections))
    for section, owner in sections.items():
        table = tables.get(section, {})
        if not isinstance(table, dict):
            problems.append(f"`{section}` ({table!r}) must be a section. Type `[{section}]`, then its keys.")
            continue
        try:
            configs[section] = owner(**table)
        except ConfigError as problem:
            problems += [f"[{section}] {line}" for line in str(problem).splitlines()]
        else:
            absent = [key for key in needs.get(section, ()) if getattr(configs[section], key) is None]
            problems += [f"[{section}] `{key}` is missing: a run needs it." for key in absent]
    if problems:
        raise ConfigError(
            "\n".join([f"{origin}:", *problems]) if len(problems) > 1 else f"{origin}: {problems[0]}"
        )
    return configs


def _misplaced(name: str, sections: Mapping[str, type]) -> str:
    """What to say of a top-level name that is no section."""
    homes = [section for section, owner in sections.items() if name in field_names(owner)]
    if "reward" in sections and (name in NOT_HONOURED or name in SAME):
        homes = ["reward"]
    if homes:
        return f"`{name}` stands outside its section. Put it under [{homes[0]}]."
    return f"`[{name}]` is no section.{_sections(name, sections)}"


def without_secrets(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without what the hub takes as a token; `True`, which means the stored one, is none."""
    return {k: v for k, v in table.items() if not (k in _SECRETS and isinstance(v, str))}


def _storable(value: Any, key: str) -> Any:
    """`value` in TOML's types; a torch dtype becomes its name, which transformers reads back."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        told = without_secrets(value)
        return {str(k): _storable(v, f"{key}.{k}") for k, v in told.items() if v is not None}
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
