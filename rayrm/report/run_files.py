"""What a training run and an evaluation left in their directories, as a report reads them.

A file that is missing or damaged costs what it holds and a note, never the rest: a report is most wanted of a
run that went wrong. What holds neither a run nor an evaluation is an error that says what to type.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.errors import RunDirectoryError
from rayrm.metrics.outcomes import Outcomes
from rayrm.report.reading import Array, Record, column, last_of_each_step, number, read_lines, read_object

METRICS, PROGRESS, RUN_TOML = "metrics.jsonl", "progress.json", "run.toml"
IDENTITY, QUARANTINE = "identity.json", "quarantine.jsonl"
EVALUATION, FORMAT = "evaluation.json", 1
_COLUMNS = ("won", "lost", "won_length", "lost_length", "weight", "row", "prompt")


@dataclass(frozen=True, slots=True)
class EvaluatedSet:
    """One set of an evaluation. `outcomes`: None where their file could not be read. `benchmark`: its own
    figures by name, of a set that is one."""

    name: str
    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    reliability: list[dict[str, float]]
    findings: list[str]
    worst: list[Record]
    outcomes: Outcomes | None
    benchmark: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluation.json` says; its sets in the order in which it names them."""

    model: str
    version: str
    created: str
    sets: list[EvaluatedSet]


@dataclass(frozen=True)
class RunFiles:
    """A run's directory, an evaluation's, or both at once.

    `records`: the logging events by step, each step once. `refused`: rows by (source, reason).
    """

    place: Path
    name: str
    is_run: bool
    records: list[Record] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    progress: Record | None = None
    rows_per_step: int | None = None
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    evaluation: Evaluation | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> Array:
        return column(self.records, "step")

    def values(self, key: str) -> Array:
        """`[n]` values of `key` by record; NaN where one has none."""
        return column(self.records, key)

    def last(self, key: str) -> float:
        """The last value that was logged of `key`; NaN: none was."""
        values = self.values(key)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else np.nan

    @cached_property
    def eval_sets(self) -> list[str]:
        """The prefixes of the log's evaluation sets (`eval_`, `eval_<set>_`), as they came."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        return [key.removesuffix("loss") for key in keys if key.startswith("eval_") and key.endswith("_loss")]


def read_run_files(directory: str | Path) -> RunFiles:
    """What a run's or an evaluation's directory holds.

    Raises:
        RunDirectoryError: there is no such directory, it holds neither, or only an evaluation of another
            format than this version reads.
    """
    place = Path(directory)
    if not place.is_dir():
        raise RunDirectoryError(
            f"`{place}` is no directory: a report is made of what `rayrm train` or `rayrm evaluate --output` "
            "wrote. Type the directory of a run or of an evaluation."
        )
    metrics, name = place / METRICS, place.resolve().name
    notes: list[str] = []
    if not metrics.is_file() and not (place / RUN_TOML).is_file():
        if not (place / EVALUATION).is_file():
            raise RunDirectoryError(_not_a_run(place))
        evaluation = read_evaluation(place, notes)
        if evaluation is None:
            raise RunDirectoryError(f"`{place / EVALUATION}` cannot be shown. {' '.join(notes)}")
        return RunFiles(place, name, False, evaluation=evaluation, notes=notes)
    records: list[Record] = []
    if metrics.is_file():
        records, stepless = last_of_each_step(read_lines(metrics, notes))
        if stepless:
            notes.append(f"{METRICS}: {stepless} records without a `step` were left out.")
    else:
        notes.append(f"{METRICS} is missing: nothing was logged yet.")
    identity = read_object(place / IDENTITY, notes) or {}
    told = identity.get("identity")
    rows = number(told.get("rows_per_step")) if isinstance(told, dict) else np.nan
    inside = next((one for one in (place / "evaluation", place) if (one / EVALUATION).is_file()), None)
    return RunFiles(
        place,
        name,
        True,
        records,
        _settings(place / RUN_TOML, notes),
        read_object(place / PROGRESS, notes),
        int(rows) if np.isfinite(rows) else None,
        _refused(place / QUARANTINE, notes),
        read_evaluation(inside, notes) if inside else None,
        notes,
    )


def _not_a_run(place: Path) -> str:
    text = (
        f"`{place}` holds no {METRICS}, {RUN_TOML} or {EVALUATION}, so it is neither a run nor an evaluation."
    )
    if (place / "sweep.json").is_file():
        return f"{text} It is a sweep: type its trials, `rayrm report {place}/trial-* --compare`."
    return f"{text} Type the `output_dir` of a run, or the `--output` of `rayrm evaluate`."


def _settings(file: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{RUN_TOML} is missing: the run's settings are not shown.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        notes.append(f"{RUN_TOML} is no whole TOML ({problem}): the run's settings are not shown.")
    return None


def _refused(file: Path, notes: list[str]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    if file.is_file():
        for row in read_lines(file, notes):
            counts[str(row.get("source", "?")), str(row.get("reason", "?"))] += 1
    return counts


def read_evaluation(place: Path, notes: list[str]) -> Evaluation | None:
    """The evaluation that a directory holds; None where it cannot be read, which is noted."""
    told = read_object(place / EVALUATION, notes)
    if told is None:
        return None
    if told.get("format") != FORMAT:
        notes.append(
            f"{EVALUATION} has format {json.dumps(told.get('format'))}, and this version of rayrm reads "
            f"{FORMAT}: left out. Evaluate again: rayrm evaluate MODEL DATA --output {place}"
        )
        return None
    sets = told.get("sets")
    if not isinstance(sets, dict):
        notes.append(f"{EVALUATION} names no sets: left out.")
        return None
    found = [_evaluated_set(place, name, one, notes) for name, one in sets.items()]
    return Evaluation(
        str(told.get("model", "")),
        str(told.get("version") or ""),
        str(told.get("created") or ""),
        [one for one in found if one is not None],
    )


def _evaluated_set(place: Path, name: str, told: Any, notes: list[str]) -> EvaluatedSet | None:
    if not isinstance(told, dict) or not isinstance(told.get("metrics"), dict):
        notes.append(f"{EVALUATION}: the set {name!r} has no metrics: left out.")
        return None
    groups = told.get("groups")
    return EvaluatedSet(
        name,
        _numbers(told["metrics"]),
        {str(group): _numbers(one) for group, one in (groups or {}).items() if isinstance(one, dict)},
        [_numbers(one) for one in told.get("reliability") or [] if isinstance(one, dict)],
        [str(one) for one in told.get("findings") or []],
        [one for one in told.get("worst") or [] if isinstance(one, dict)],
        _outcomes(place, name, told.get("outcomes"), notes),
        _flat_numbers(told.get("benchmark")),
    )


def _numbers(told: dict[str, Any]) -> dict[str, float]:
    """Those that are finite numbers: what could not be measured is null in the file."""
    return {key: number(value) for key, value in told.items() if np.isfinite(number(value))}


def _flat_numbers(told: Any, head: str = "") -> dict[str, float]:
    """The numbers of nested tables, by their keys one after the other."""
    found: dict[str, float] = {}
    for key, value in told.items() if isinstance(told, dict) else ():
        name = f"{head}, {key}" if head else str(key)
        found |= _flat_numbers(value, name) if isinstance(value, dict) else _numbers({name: value})
    return found


def _outcomes(place: Path, name: str, file: Any, notes: list[str]) -> Outcomes | None:
    if not isinstance(file, str) or Path(file).name != file:
        notes.append(
            f"{EVALUATION}: the set {name!r} names no outcomes beside it: its pictures are not drawn."
        )
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(place / file, columns=[*_COLUMNS, "group"])
    except (OSError, pa.ArrowException) as problem:
        notes.append(f"{file} cannot be read ({problem}): the pictures of {name!r} are not drawn.")
        return None
    arrays = {key: table.column(key).to_numpy() for key in _COLUMNS}
    groups, places = np.unique(table.column("group").to_pylist(), return_inverse=True)
    return Outcomes(**arrays, group=places.astype(np.int64), groups=tuple(groups.tolist()))
