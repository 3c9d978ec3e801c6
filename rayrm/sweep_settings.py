"""What a sweep is told: `[sweep]` and `[sweep.space]` of a run file. No torch, no ray.

The space says which values a key of the run may take: a list of values, or a range to draw from,
`{log = [LOW, HIGH]}`, `{uniform = [LOW, HIGH]}`, `{int = [LOW, HIGH]}` (both ends may be drawn). On the
command line the same is typed `--param key=a,b,c` and `--param key=log:LOW:HIGH`.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrm.errors import ConfigError
from rayrm.rules import is_error
from rayrm.runfile import SECTIONS, Run, dump_tables, make_tables, read_toml
from rayrm.settings import OptionalCount, OptionalSeed, json_value, nearest, none_word, settings

Kind = Literal["log", "uniform", "int"]
KINDS: tuple[Kind, ...] = ("log", "uniform", "int")
# As other libraries call a range, or a list of values.
_FOREIGN_KINDS = (
    "loguniform",
    "log_uniform",
    "lognormal",
    "quniform",
    "normal",
    "randint",
    "range",
    "choice",
)
_TYPED_RANGE = re.compile(r"([A-Za-z_]+):[^:]+:[^:]+")
Mode = Literal["max", "min"]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`: even in the logarithm ("log"), even ("uniform"), or whole ("int")."""

    kind: Kind
    low: float
    high: float

    def draw(self, source: random.Random) -> str:
        """A value as typed on the command line."""
        if self.kind == "int":
            return str(source.randint(int(self.low), int(self.high)))
        if self.kind == "log":
            drawn = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = source.uniform(self.low, self.high)
        return f"{drawn:.4g}"

    def number(self, text: str) -> float:
        """A value as typed, as a number."""
        return int(text) if self.kind == "int" else float(text)

    def examples(self) -> tuple[str, ...]:
        """Both ends, and of numbers that are not whole one in between, which may be no value of the key."""
        ends = (f"{self.low:.12g}", f"{self.high:.12g}")
        if self.kind == "int":
            return ends
        part = 0.382
        within = (
            self.low ** (1 - part) * self.high**part
            if self.kind == "log"
            else self.low * (1 - part) + self.high * part
        )
        return (*ends, f"{within:.4g}")


Space = dict[str, tuple[str, ...] | Range]
"""By key of the run: the values to try, as they are typed, or the range to draw from."""


@settings
class SweepConfig:
    """Which trials a sweep has, what decides between them, and what becomes of the best."""

    metric: str = "eval_accuracy"
    """What decides: any logged metric; of an evaluation set by name `eval_<name>_accuracy`. A trial's value
    is that of the model it leaves: the last one, or the best checkpoint's with `load_best_model_at_end`."""
    mode: Annotated[Mode | None, BeforeValidator(none_word)] = None
    """Whether more of it is better ("max") or less ("min"). None: less of an error, as `greater_is_better`
    has it, and of all else more."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination of the lists, each with `num_trials` draws of the ranges. random: `num_trials`
    draws of everything. optuna: `num_trials` suggestions of Optuna's TPE, by the outcomes so far."""
    num_trials: OptionalCount = None
    """How many trials, or, of a grid with ranges, how many draws for each combination."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """none: every trial trains to its end. asha: asynchronous successive halving (Li et al. 2020,
    https://arxiv.org/abs/1810.05934): at certain parts of the run the worse trials are stopped. pbt:
    population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846): there the worst go
    on from the models of the best, with other values of the space."""
    grace: Annotated[float, Field(gt=0, lt=100)] = 10.0
    """asha: no trial is stopped before this percentage of its steps."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """asha: decisions fall at `grace`, `grace * reduction`, ... percent, and of the trials that came so far
    the best 1 / `reduction` go on."""
    perturb_every: Annotated[float, Field(gt=0, lt=100)] = 20.0
    """pbt: the trials are compared after each such percentage of their steps, at the next evaluation."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """pbt: this share of them, the worst, goes on from one of as many of the best."""
    max_concurrent: OptionalCount = None
    """Trials at once, where the cluster has room for so many. None: as many as fit."""
    seed: OptionalSeed = None
    """Of the draws, of Optuna, and of what pbt chooses. None: the run's `seed`."""
    publish: Annotated[str | None, BeforeValidator(none_word)] = None
    """Publish the best trial's model under this name."""
    registry: str = "registry"
    """The directory of published models that `publish` copies into."""
    space: Annotated[dict[str, Any], BeforeValidator(json_value)] = field(default_factory=dict)
    """[sweep.space]: by key of the run its values or range."""

    def __post_init__(self) -> None:
        if self.scheduler == "pbt" and not self.metric.startswith("eval_"):
            raise ValueError(
                f'`metric` ("{self.metric}"): `scheduler` "pbt" compares the checkpoints of trials, and they '
                "are measured by evaluations alone: what is logged in training is of other steps and rows. "
                'Type an evaluation\'s, such as "eval_accuracy" or "eval_loss".'
            )
        space_of(self.space)
        if self.scheduler != "none" and self.metric == "train_loss":
            raise ValueError(
                '`metric` ("train_loss") is known at a trial\'s end only, and `scheduler` '
                f'"{self.scheduler}" decides before. Type an evaluation\'s, such as "eval_loss", or '
                '`scheduler = "none"`.'
            )
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError(
                '`search` ("optuna") suggests values for whole trials, and `scheduler` "pbt" changes them '
                'within. Type `search = "random"`, or `scheduler = "asha"`.'
            )

    @property
    def direction(self) -> Mode:
        """`mode`, resolved."""
        return self.mode or ("min" if is_error(self.metric) else "max")


@dataclass(frozen=True, slots=True)
class SweepFile:
    """A run file with its `[sweep]`, read once: every trial is made of what it said at the start."""

    tables: dict[str, Any]
    overrides: tuple[str, ...]
    origin: str

    def read(self, words: Sequence[str] = ()) -> tuple[Run, SweepConfig]:
        """The run that further `words` make, and the sweep. Raises ConfigError as `read_run` does."""
        built = make_tables(
            copy.deepcopy(self.tables),
            [*self.overrides, *words],
            {**SECTIONS, "sweep": SweepConfig},
            origin=self.origin,
            needs={"data": ("train",)},
        )
        sweep: SweepConfig = built.pop("sweep")
        return Run(**built), sweep


def read_sweep(path: str | Path | None, overrides: Sequence[str] = ()) -> SweepFile:
    """A run file that may have a `[sweep]`, and words over it (`learning_rate=2e-6`,
    `sweep.num_trials=8`)."""
    tables = {} if path is None else read_toml(Path(path))
    return SweepFile(tables, tuple(overrides), "the command line" if path is None else str(path))


def dump_sweep(run: Run, sweep: SweepConfig) -> str:
    """Both as TOML, which `read_sweep` reads back."""
    return dump_tables({**{section: getattr(run, section) for section in SECTIONS}, "sweep": sweep})


def space_of(table: Mapping[str, Any], within: str = "") -> Space:
    """[sweep.space] as a space; tables of tables are keys with dots (`model.lora.r`).

    `within`: the key that the table stands under, with its dot.

    Raises:
        ConfigError: neither a list of values nor a range, or a value listed twice.
    """
    space: Space = {}
    for name, value in table.items():
        key = within + name
        if isinstance(value, Mapping) and (value.keys() & {*KINDS, *_FOREIGN_KINDS} or _is_range(value)):
            kind, ends = next(iter(value.items()))
            if len(value) > 1:
                raise ConfigError(
                    f"`space.{key}` ({dict(value)!r}): a range has one kind and two ends. Type for example "
                    "`{log = [1e-6, 1e-4]}`."
                )
            space[key] = _range(key, kind, ends)
        elif isinstance(value, Mapping) and value:
            space |= space_of(value, f"{key}.")
        elif isinstance(value, list) and value:
            space[key] = _listed(key, [_word(key, one) for one in value])
        else:
            raise ConfigError(
                f"`space.{key}` ({value!r}) must be a list of values or a range. Type for example "
                "`[1e-5, 3e-5]` or `{log = [1e-6, 1e-4]}`."
            )
    return space


def space_of_params(params: Sequence[str]) -> Space:
    """`--param` words as a space: `key=a,b,c` lists values (commas inside brackets or quotes do not count),
    `key=log:LOW:HIGH` (uniform, int) is a range.

    Raises:
        ConfigError: neither of these, or a key given twice.
    """
    space: Space = {}
    for param in params:
        key, equals, text = param.partition("=")
        if not equals or not key or not text:
            raise ConfigError(
                f"param `{param}` must be key=values. Type for example `learning_rate=1e-5,3e-5`."
            )
        if key in space:
            raise ConfigError(f"param `{key}` is given twice. Put all its values into one `--param`.")
        kind, *ends = text.split(":")
        found = _TYPED_RANGE.fullmatch(text)
        is_range = kind in KINDS or (found is not None and _is_kind(found[1]))
        space[key] = _range(key, kind, ends) if is_range else _listed(key, _split(text))
    return space


def _is_range(table: Mapping[str, Any]) -> bool:
    """Whether a table is meant as one, though its kind is misspelt."""
    ends = next(iter(table.values()), None)
    pair = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return len(table) == 1 and pair and _is_kind(next(iter(table)))


def _is_kind(word: str) -> bool:
    """Whether it is meant as one: as other libraries have it, or misspelt."""
    return word in _FOREIGN_KINDS or bool(nearest(word, KINDS))


def _listed(key: str, values: list[str]) -> tuple[str, ...]:
    if twice := next((one for place, one in enumerate(values) if one in values[:place]), None):
        raise ConfigError(
            f"`space.{key}` lists `{twice}` twice: two trials would be one and the same. Delete one."
        )
    return tuple(values)


def _range(key: str, kind: Any, ends: Any) -> Range:
    if kind not in KINDS:
        raise ConfigError(
            f"the range of `{key}`: `{kind}` is no kind of range. Type one of {', '.join(KINDS)}, such as "
            f"`{key}=log:1e-6:1e-4`, in a file `{{log = [1e-6, 1e-4]}}`, or list the values."
        )
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        raise ConfigError(
            f"the range of `{key}` ({kind}: {ends!r}) must be KIND:LOW:HIGH with two numbers. Type for "
            "example `learning_rate=log:1e-6:1e-4`, in a file `learning_rate = {log = [1e-6, 1e-4]}`."
        ) from None
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (kind == "log" and low <= 0):
        raise ConfigError(
            f"the range of `{key}`: LOW ({low:g}) must be below HIGH ({high:g})"
            f"{', and above 0 for a log range' if kind == 'log' else ''}. Type the smaller first."
        )
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(
            f"the range of `{key}` (int: {low:g} to {high:g}) must have whole ends. Type for example "
            f"`{key}=int:1:4`, or `uniform` for numbers in between."
        )
    return Range(kind, low, high)


def _word(key: str, value: Any) -> str:
    """A value as an override types it, so that it is read back as it is."""
    if isinstance(value, str):
        bare = value and all(letter.isalnum() or letter in "_-./ " for letter in value)
        return value if bare and not _reads_as_other(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool | int | float | list):
        return json.dumps(value)
    raise ConfigError(f"`space.{key}` holds {value!r}. Its values must be strings, numbers or lists.")


def _reads_as_other(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return text in ("inf", "nan") or text[0].isdigit()
    return True


def _split(text: str) -> list[str]:
    """`text` cut at its commas, but those inside brackets, braces or quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]
