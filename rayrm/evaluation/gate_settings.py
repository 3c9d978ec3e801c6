"""What a gate file says: the sets that a model is measured on, and what it must reach there. No torch.

min_accuracy = 0.6              # of every set that does not say otherwise

[sets.chat]
data = "data/chat.jsonl"
min_accuracy = 0.7
max_ece = 0.1
max_length_correlation = 0.4
no_worse = true                 # than the current version of the registry, by a paired test
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayrm.data_settings import Sources
from rayrm.errors import ConfigError
from rayrm.runfile import read_toml
from rayrm.settings import Fraction, OptionalCount, frozen_settings, none_word

_OptionalShare = Annotated[Fraction | None, BeforeValidator(none_word)]
_OptionalError = Annotated[Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(none_word)]


@frozen_settings
class GateSet:
    """[sets.<name>]: held-out pairs, and what is asked of a model on them. What is None is not asked."""

    data: Sources
    """Sources as those of `[data] eval` in a run file."""
    _: KW_ONLY
    min_accuracy: _OptionalShare = None
    """The accuracy must be at least this."""
    max_ece: _OptionalError = None
    """The expected calibration error of sigmoid(margin) must be at most this."""
    max_length_correlation: _OptionalShare = None
    """The correlation of margins with differences of length must lie between minus this and this. Over all
    scores it would be that of the prompts' lengths, too."""
    no_worse: bool = False
    """Refused where the current version is better: the 95% interval of the difference of both accuracies on
    the same pairs, by resampled prompts, lies below -`allowed_drop`."""
    allowed_drop: Fraction = 0.0
    """How much less accurate `no_worse` lets a model be."""
    max_pairs: OptionalCount = None
    """Read only the first rows of each source, this many."""


RULES = ("min_accuracy", "max_ece", "max_length_correlation", "no_worse")
DEFAULTS = tuple(one.name for one in dataclasses.fields(GateSet) if one.name != "data")
"""What may also stand at the head of the file, for every set that does not say otherwise."""


def read_gate(path: str | Path) -> dict[str, GateSet]:
    """The sets of a gate file, by name.

    Raises:
        ConfigError: the file is missing or no TOML; a key or value is wrong; no set, or one of which nothing
            is asked.
    """
    tables = read_toml(Path(path))
    sets = tables.pop("sets", None)
    if not isinstance(sets, Mapping) or not sets:
        raise ConfigError(
            f'{path}: names no set. Type `[sets.NAME]`, then `data = "FILE"` and what is asked of it: '
            f"{', '.join(RULES)}."
        )
    if unknown := sorted(set(tables) - set(DEFAULTS)):
        raise ConfigError(
            f"{path}: `{unknown[0]}` is no key of a gate. Type one of {', '.join(DEFAULTS)}, or "
            "a table `[sets.NAME]`."
        )
    return {name: _set_of(path, name, table, tables) for name, table in sets.items()}


def _set_of(path: str | Path, name: str, table: Any, common: Mapping[str, Any]) -> GateSet:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: `sets.{name}` ({table!r}) must be a table. Type `[sets.{name}]`.")
    try:
        made = GateSet(**{**common, **table})
    except ConfigError as problem:
        raise ConfigError(
            "\n".join(f"{path}: [sets.{name}] {line}" for line in str(problem).splitlines())
        ) from None
    if not any(getattr(made, rule) not in (None, False) for rule in RULES):
        raise ConfigError(f"{path}: [sets.{name}] asks nothing of a model. Type one of {', '.join(RULES)}.")
    return made
