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
from rayrm.train.checkpoint import checkpoints, step_of
from rayrm.train.holding import LOCK
from rayrm.train.records import read_progress, read_records, replace_text
from rayrm.train.rundir import differing_in

SUMMARY = "sweep.json"
REPORT = "sweep.html"
# What a sweep's directory may hold before its record: the lock of the process that asks.
_OURS = {LOCK}


@dataclass(frozen=True, slots=True)
class Exchange:
    """Where population based training ended a trial's leg: it went on from a better trial's checkpoint."""

    at: float
    """The percentage of its steps."""
    words: tuple[str, ...]
    directory: Path
    """These were the trial's until then; what it gave up stays there."""
    metric: float | None
    """Its value there; None: it had failed."""
    donor: str
    """The name of the directory whose checkpoint it took, and `donor_metric` the value of that."""
    donor_metric: float


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
    exchanges: tuple[Exchange, ...] = ()
    """Of population based training, in order; `words` and `directory` are those after the last."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(word.partition("=")[0] for word in self.words)

    @property
    def values(self) -> tuple[str, ...]:
        """As they are shown: a number of many digits by four of them."""
        return values_of(self.words)

    @property
    def legs(self) -> list[tuple[Path, tuple[str, ...]]]:
        """The directories that it trained in, in order, and with which words in each."""
        return [*((one.directory, one.words) for one in self.exchanges), (self.directory, self.words)]

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
        self.home, self.metric, self._mode = home, metric, mode
        self._identity = json.loads(json.dumps(identity, default=str))
        self.trials: dict[int, Trial] = {}
        self.until: float | None = None
        """Of population based training: the percentage up to which the trials are training."""
        file = home / SUMMARY
        if file.is_file():
            self._take_up(file)
        elif home.exists() and (not home.is_dir() or {path.name for path in home.iterdir()} - _OURS):
            raise RunDirectoryError(
                f"`output_dir` ({home}) is not empty, and a sweep overwrites nothing. Type another: "
                f"`output_dir={home}-2`."
            )

    def directory(self, number: int) -> Path:
        """Of the trial of this number, from 1; after an exchange it is another."""
        known = self.trials.get(number)
        return self.home / f"trial-{number:02d}" if known is None else known.directory

    def begin(self, number: int, words: tuple[str, ...]) -> None:
        """A trial is to be run."""
        self.trials[number] = Trial(words, self.directory(number))
        self.write()

    def end(self, number: int, **outcome: Any) -> Trial:
        """A trial ended: its `metric`, with `stopped_at` where it was stopped, or its `failure`."""
        self.trials[number] = dataclasses.replace(self.trials[number], **outcome)
        self.write()
        return self.trials[number]

    def go_on(self, changed: dict[int, Trial], until: float) -> None:
        """The population goes on to `until` percent, these trials in new directories."""
        self.trials |= changed
        self.until = until
        self.write()

    @property
    def sweep(self) -> Sweep:
        trials = [self.trials[number] for number in sorted(self.trials)]
        return Sweep(self.metric, self._mode, self.home, trials, best_of(trials, self._mode))

    def write(self) -> None:
        kept = dataclasses.asdict(self.sweep)
        del kept["home"]
        for trial in [*kept["trials"], *([kept["best"]] if kept["best"] else [])]:
            for place in (trial, *trial["exchanges"]):
                place["directory"] = place["directory"].name
        if self.until is not None:
            kept["until"] = self.until
        kept["identity"] = self._identity
        with writing(self.home / SUMMARY):
            replace_text(self.home / SUMMARY, json.dumps(kept, indent=2) + "\n")

    def _take_up(self, file: Path) -> None:
        try:
            before = json.loads(file.read_text())
            identity, trials = before["identity"], before["trials"]
            self.until = before.get("until")
            for trial in trials:
                # "trial-03.2" is the third trial after its first exchange.
                number = int(trial["directory"].removeprefix("trial-").partition(".")[0])
                kept = {key: trial[key] for key in ("metric", "stopped_at")}
                kept["exchanges"] = tuple(map(self._exchange, trial.get("exchanges", ())))
                directory = self.home / trial["directory"]
                self.trials[number] = Trial(tuple(trial["words"]), directory, **kept)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(
                f"sweep record `{file}` is damaged ({type(error).__name__}: {error}). Choose another "
                "`output_dir`."
            ) from error
        if differing := differing_in(identity, self._identity):
            raise RunDirectoryError(
                f"`output_dir` ({self.home}) holds another sweep. They differ in {differing}. "
                "Choose another `output_dir`, or set these back to go on with it."
            )

    def _exchange(self, kept: dict[str, Any]) -> Exchange:
        changes = {"words": tuple(kept["words"]), "directory": self.home / kept["directory"]}
        return Exchange(**{**kept, **changes})


@dataclass(frozen=True, slots=True)
class Handover:
    """At `at` percent the trial of the directory `left` went on from `donor`'s checkpoint, in `name` with
    `words`."""

    at: float
    left: str
    metric: float | None
    donor: str
    donor_metric: float
    name: str
    words: tuple[str, ...]


def handovers(trials: list[Trial]) -> list[Handover]:
    """All exchanges, by their percentages, then by trial."""
    found = [
        Handover(one.at, one.directory.name, one.metric, one.donor, one.donor_metric, directory.name, words)
        for trial in trials
        for one, (directory, words) in zip(trial.exchanges, trial.legs[1:], strict=True)
    ]
    return sorted(found, key=lambda one: one.at)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A model was trained with `words` from `begin` to `end` percent of its steps, in `name`'s directory."""

    begin: float
    end: float
    words: tuple[str, ...]
    name: str


def schedule_of(trials: list[Trial], trial: Trial) -> list[Stretch]:
    """How the model that a trial has came to be: back through the checkpoints it was taken from, in order."""
    words = {directory.name: words for one in trials for directory, words in one.legs}
    origins = {one.name: one for one in handovers(trials)}
    name, end = trial.directory.name, 100.0 if trial.stopped_at is None else trial.stopped_at
    found: list[Stretch] = []
    while (origin := origins.get(name)) is not None:
        found.append(Stretch(origin.at, end, words[name], name))
        name, end = origin.donor, origin.at
    return [Stretch(0.0, end, words[name], name), *reversed(found)]


def stands_at(directory: Path, metric: str, until: float) -> tuple[float, float] | None:
    """(percentage of the steps, value) of the evaluation with which a leg `until` this percentage has ended;
    None: it has not, with its checkpoint."""
    num_steps = read_progress(directory).get("num_steps", 0)
    found = next((one for one in curve_of(directory, metric) if one[0] >= until), None)
    step = round(found[0] * num_steps / 100) if found else 0
    return found if any(step_of(path) == step for path in checkpoints(directory)) else None


def curve_of(directory: Path, metric: str) -> list[tuple[float, float]]:
    """(percentage of the steps, value) of each evaluation of a trial so far, in order."""
    num_steps = read_progress(directory).get("num_steps")
    if not num_steps:
        return []
    found = [(record["step"], record[metric]) for record in read_records(directory) if metric in record]
    return [(100.0 * step / num_steps, float(value)) for step, value in found]


def curve_of_trial(trial: Trial, metric: str) -> list[tuple[float, float]]:
    """(percentage of its steps, value) of each evaluation of a trial, through all the directories it had."""
    return [point for directory, _ in trial.legs for point in curve_of(directory, metric)]


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


def values_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """What words set their keys to, as it is shown: a number of many digits by four of them."""
    return tuple(_short(word.partition("=")[2]) for word in words)


def _short(text: str) -> str:
    try:
        number = json.loads(text)
    except json.JSONDecodeError:
        return text
    return f"{number:.4g}" if isinstance(number, float) and len(text) > 8 else text
