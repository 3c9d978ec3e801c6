"""What is known of a sweep's trials: `sweep.json` beside them, and what each trial's directory says.

`sweep.json` is written whole each time that a trial begins or ends, so that a sweep that was cut off goes on:
trials that ended are not run again, those that a kill cut off go on from their checkpoints, and the
searches and decisions are told again what was known. A trial that came to its end says so in its own
directory; a kill between that and the record loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrm.errors import ConfigError, RunDirectoryError, writing
from rayrm.sweep_settings import Mode
from rayrm.train.records import read_progress, read_records, replace_text

SUMMARY = "sweep.json"
REPORT = "sweep.html"
# What a sweep's directory may hold before its record: the lock of the process that asks.
_OURS = {".lock"}


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one trial: its metric, or why it has none."""

    words: tuple[str, ...]
    """The overrides that make it, as typed: `learning_rate=1e-5`."""
    directory: Path
    metric: float | None = None
    failure: str | None = None
    stopped_at: float | None = None
    """The percentage of its steps at which the scheduler stopped it; `metric` is the value there."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(word.partition("=")[0] for word in self.words)

    @property
    def values(self) -> tuple[str, ...]:
        """As they are shown: a number of many digits by four of them."""
        return tuple(_short(word.partition("=")[2]) for word in self.words)

    @property
    def ended(self) -> bool:
        """Nothing is left to do; one that failed is tried again by the same command."""
        return self.metric is not None


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials in their order, and the best that came to its end (None: none did)."""

    metric: str
    mode: Mode
    home: Path
    trials: list[Trial]
    best: Trial | None


def best_of(trials: list[Trial], mode: Mode) -> Trial | None:
    """The trial with the best metric, the first of equals; failed and stopped ones do not take part."""
    sign = 1.0 if mode == "max" else -1.0
    done = [
        (sign * trial.metric, -number, trial)
        for number, trial in enumerate(trials)
        if trial.metric is not None and trial.stopped_at is None
    ]
    return max(done)[2] if done else None


class Record:
    """`sweep.json` of the sweep in `home`, of which `identity` says what may not change between two
    starts."""

    def __init__(self, home: Path, metric: str, mode: Mode, identity: dict[str, Any]) -> None:
        """Raises RunDirectoryError where `home` holds something else, or another sweep."""
        self.home, self._metric, self._mode = home, metric, mode
        self._identity = json.loads(json.dumps(identity, default=str))
        self.trials: dict[int, Trial] = {}
        file = home / SUMMARY
        if file.is_file():
            self._take_up(file)
        elif home.exists() and (not home.is_dir() or {path.name for path in home.iterdir()} - _OURS):
            raise RunDirectoryError(
                f"`output_dir` ({home}) is not empty, and a sweep overwrites nothing. Type another: "
                f"`output_dir={home}-2`."
            )

    def directory(self, number: int) -> Path:
        """Of the trial of this number, from 1."""
        return self.home / f"trial-{number:02d}"

    def begin(self, number: int, words: tuple[str, ...]) -> None:
        """A trial is to be run."""
        self.trials[number] = Trial(words, self.directory(number))
        self.write()

    def end(self, number: int, **outcome: Any) -> Trial:
        """A trial ended: its `metric`, with `stopped_at` where it was stopped, or its `failure`."""
        self.trials[number] = dataclasses.replace(self.trials[number], **outcome)
        self.write()
        return self.trials[number]

    @property
    def sweep(self) -> Sweep:
        trials = [self.trials[number] for number in sorted(self.trials)]
        return Sweep(self._metric, self._mode, self.home, trials, best_of(trials, self._mode))

    def write(self) -> None:
        kept = dataclasses.asdict(self.sweep)
        del kept["home"]
        for trial in [*kept["trials"], *([kept["best"]] if kept["best"] else [])]:
            trial["directory"] = trial["directory"].name
        kept["identity"] = self._identity
        with writing(self.home / SUMMARY):
            replace_text(self.home / SUMMARY, json.dumps(kept, indent=2) + "\n")

    def _take_up(self, file: Path) -> None:
        try:
            before = json.loads(file.read_text())
            identity, trials = before["identity"], before["trials"]
            for trial in trials:
                number = int(trial["directory"].removeprefix("trial-"))
                kept = {key: trial[key] for key in ("metric", "stopped_at")}
                self.trials[number] = Trial(tuple(trial["words"]), self.directory(number), **kept)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(
                f"sweep record `{file}` is damaged ({type(error).__name__}: {error}). Choose another "
                "`output_dir`."
            ) from error
        differing = [
            f"{key}: {identity.get(key)!r} there, {self._identity.get(key)!r} here"
            for key in sorted({*identity, *self._identity})
            if identity.get(key) != self._identity.get(key)
        ]
        if differing:
            raise RunDirectoryError(
                f"`output_dir` ({self.home}) holds another sweep. They differ in {'; '.join(differing[:5])}. "
                "Choose another `output_dir`, or set these back to go on with it."
            )


def curve_of(directory: Path, metric: str) -> list[tuple[float, float]]:
    """(percentage of the steps, value) of each evaluation of a trial so far, in order."""
    num_steps = read_progress(directory).get("num_steps")
    if not num_steps:
        return []
    found = [(record["step"], record[metric]) for record in read_records(directory) if metric in record]
    return [(100.0 * step / num_steps, float(value)) for step, value in found]


def value_of(directory: Path, metric: str, *, loads_best: bool) -> float:
    """The metric of the model that a finished trial left: its last, or that of its best checkpoint.

    Raises:
        ConfigError: it was not logged.
    """
    records = read_records(directory)
    best = read_progress(directory).get("best_checkpoint") if loads_best else None
    step = int(str(best).rpartition("-")[2]) if best else None
    found = [record for record in records if metric in record]
    if not found:
        known = ", ".join(sorted({key for record in records for key in record} - {"step", "epoch"}))
        raise ConfigError(f"`metric` ({metric}) was not logged. Type one of {known}.")
    at_best = [record for record in found if record["step"] == step]
    return float((at_best or found)[-1][metric])


def _short(text: str) -> str:
    try:
        number = json.loads(text)
    except json.JSONDecodeError:
        return text
    return f"{number:.4g}" if isinstance(number, float) and len(text) > 8 else text
