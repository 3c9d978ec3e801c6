"""[RAY] Population based training: all trials to one percentage of their steps, then an exchange.

Who takes whose checkpoint, and with which values, is decided by Ray Tune's own `PopulationBasedTraining` in
its synchronous form, which compares trials when all have come equally far. It is told of them here, and not
by a running Tune: between two comparisons each leg is a Tune run of its own, and what was decided is in
`sweep.json` before anything goes on by it. So a kill at any moment loses no decision, and the same seed makes
the same ones.

A trial that failed counts as the worst of all. What it or another takes is a copy of the donor's checkpoint
(hard links where the disk has them), which stays until the new leg has saved one: the donor's own may rotate.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining

from rayrm.errors import CheckpointError, writing
from rayrm.runfile import Run
from rayrm.sweep_settings import Range, Space, SweepConfig
from rayrm.train.checkpoint import IDENTITY, checkpoints
from rayrm.train.leg import Leg
from rayrm.train.sweep_plan import Words, values_by_key
from rayrm.train.sweep_record import Exchange, Record, Trial, stands_at
from rayrm.train.sweep_trial import PROGRESS, VALUE

logger = logging.getLogger("rayrm.train")
_DONORS = ".donors"


def train_population(
    record: Record,
    space: Space,
    sweep: SweepConfig,
    seed: int,
    num_trials: int,
    train: Callable[[list[int], Leg], None],
) -> None:
    """Train all trials to their ends; `train` brings those of these numbers to a leg's end, or raises."""
    while True:
        until = record.until or sweep.perturb_every
        leg = Leg(until if until < 100 else None)
        waiting = [number for number in range(1, num_trials + 1) if _is_to_train(record, number, leg)]
        if waiting:
            train(waiting, leg)
        standing = {n: _standing(record, n, leg) for n, trial in record.trials.items() if not trial.ended}
        reached = [found[0] for found in standing.values() if found is not None]
        if not reached:
            break
        values = {number: None if found is None else found[1] for number, found in standing.items()}
        _compare(record, values, space, sweep, seed, reached[0])
    _drop_used(record)
    if not any(trial.exchanges for trial in record.trials.values()):
        logger.warning(
            "population based training changed nothing: no trials were compared from %g%% of their steps on. "
            "Evaluate more often (`eval_steps`), or lower `sweep.perturb_every`.",
            sweep.perturb_every,
        )


def _is_to_train(record: Record, number: int, leg: Leg) -> bool:
    trial = record.trials.get(number)
    if trial is None:
        return True
    # One that failed waits until it is given another model, or the sweep is started again.
    return not trial.ended and trial.failure is None and _standing(record, number, leg) is None


def _standing(record: Record, number: int, leg: Leg) -> tuple[float, float] | None:
    trial = record.trials[number]
    if leg.until is None or trial.ended or trial.failure is not None:
        return None
    return stands_at(trial.directory, record.metric, leg.until)


def _compare(
    record: Record, values: dict[int, float | None], space: Space, sweep: SweepConfig, seed: int, at: float
) -> None:
    """Let the worst of the trials, which all stand at `at` percent, go on from the best; a value of None:
    it failed."""
    words = {number: record.trials[number].words for number in values}
    changed: dict[int, Trial] = {}
    for number, (donor, new) in choose(values, words, space, sweep, seed, at).items():
        before, taken = record.trials[number], record.trials[donor]
        value, taken_value = values[number], values[donor]
        assert taken_value is not None  # of one that failed there is no checkpoint to take
        exchange = Exchange(at, before.words, before.directory, value, taken.directory.name, taken_value)
        directory = record.home / f"trial-{number:02d}.{len(before.exchanges) + 2}"
        _pin(checkpoints(taken.directory)[-1], record.home / _DONORS / directory.name)
        changed[number] = Trial(new, directory, exchanges=(*before.exchanges, exchange))
        logger.info(
            "at %.0f%%: %s (%s) goes on from %s (%.4f) as %s with %s",
            *(at, before.directory.name, "failed" if value is None else f"{value:.4f}"),
            *(taken.directory.name, taken_value, directory.name, " ".join(new)),
        )
    passed = math.floor(at / sweep.perturb_every + 1e-9)
    record.go_on(changed, (passed + 1) * sweep.perturb_every)
    _drop_used(record)


def choose(
    values: dict[int, float | None],
    words: dict[int, Words],
    space: Space,
    sweep: SweepConfig,
    seed: int,
    at: float,
) -> dict[int, tuple[int, Words]]:
    """Of each trial that gives up its model the number of the donor, and its new words.

    `values`, `words`: of all trials by number, which stand at `at` percent; None: it failed. By Ray Tune's
    PopulationBasedTraining: a new value is one of the range or list (one time in four), or the donor's times
    0.8 or 1.2, of a list its neighbour. It stays within its range.
    """
    logging.getLogger("ray.tune.schedulers.pbt").setLevel(logging.WARNING)  # it numbers trials otherwise
    with _seeded(f"{seed} {at:.6f}") as source:
        scheduler = PopulationBasedTraining(
            time_attr=PROGRESS,
            metric=VALUE,
            mode=sweep.direction,
            perturbation_interval=at,
            hyperparam_mutations={key: _mutation(allowed, source) for key, allowed in space.items()},
            quantile_fraction=sweep.quantile,
            custom_explore_fn=lambda config: {key: _within(space[key], one) for key, one in config.items()},
            log_config=False,
            synch=True,
        )
        population = [
            _Member(number, value is not None, values_by_key(space, words[number]))
            for number, value in sorted(values.items())
        ]
        controller = SimpleNamespace(
            search_alg=None, get_trials=lambda: population, get_live_trials=lambda: population
        )
        for member in population:
            scheduler.on_trial_add(controller, member)
        worst = -math.inf if sweep.direction == "max" else math.inf
        for member in population:
            value = values[member.number]
            told = {PROGRESS: at, VALUE: worst if value is None else value}
            scheduler.on_trial_result(controller, member, told)
    return {
        member.number: (member.donor, tuple(f"{key}={_shown(member.config[key])}" for key in space))
        for member in population
        if member.donor is not None
    }


class _Member:
    """A trial that stands, as the scheduler sees one that Tune has paused."""

    def __init__(self, number: int, has_checkpoint: bool, config: dict[str, Any]) -> None:
        self.number, self.config = number, config
        self.trial_id = self.experiment_tag = str(number)
        self.status = TuneTrial.PAUSED
        self.checkpoint = number if has_checkpoint else None
        self.temporary_state = SimpleNamespace(saving_to=None)
        self.evaluated_params: dict[str, Any] = {}
        self._kept = SimpleNamespace(
            checkpoint_config=SimpleNamespace(num_to_keep=None), _latest_checkpoint_result=None
        )
        self.run_metadata = SimpleNamespace(checkpoint_manager=self._kept)

    def is_finished(self) -> bool:
        return False

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    @property
    def donor(self) -> int | None:
        """The number of the trial whose checkpoint it was given."""
        given = self._kept._latest_checkpoint_result
        return None if given is None else int(given.checkpoint)


@contextmanager
def _seeded(text: str) -> Iterator[random.Random]:
    """Within the block what the scheduler draws (by `random` itself), and what we do, is of this seed."""
    before = random.getstate()
    random.seed(text)
    try:
        yield random.Random(text)
    finally:
        random.setstate(before)


def _mutation(allowed: tuple[str, ...] | Range, source: random.Random) -> Any:
    return (lambda: allowed.number(allowed.draw(source))) if isinstance(allowed, Range) else list(allowed)


def _within(allowed: tuple[str, ...] | Range, value: Any) -> Any:
    """A rate of decay times 1.2 may be none any more."""
    if not isinstance(allowed, Range):
        return value
    kept = min(max(value, allowed.low), allowed.high)
    return int(kept) if allowed.kind == "int" else kept


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def going_on(run: Run, home: Path) -> Run:
    """A leg's run: in a directory that it has not begun in, it goes on from the checkpoint pinned for it.

    Raises CheckpointError where that is gone.
    """
    directory = Path(run.reward.output_dir or "")
    if "." not in directory.name or (directory / IDENTITY).exists():
        return run  # a directory that is a run's knows what it goes on from
    pinned = checkpoints(home / _DONORS / directory.name)
    if not pinned:
        raise CheckpointError(
            f"`{directory.name}` was to go on from another trial's checkpoint, which is no more in "
            f"`{home / _DONORS}`. Begin the sweep anew: choose another `output_dir`."
        )
    reward = dataclasses.replace(run.reward, resume_from_checkpoint=str(pinned[-1]))
    return dataclasses.replace(run, reward=reward)


def _pin(checkpoint: Path, place: Path) -> None:
    """Keep a checkpoint, whatever becomes of it where it is."""
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)  # of a start that was cut off before it was recorded
        shutil.copytree(checkpoint, place / checkpoint.name, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _drop_used(record: Record) -> None:
    """Of what was pinned keep what a leg that has saved nothing yet goes on from."""
    wanted = {
        trial.directory.name
        for trial in record.trials.values()
        if not trial.ended and not checkpoints(trial.directory)
    }
    places = record.home / _DONORS
    for place in places.iterdir() if places.is_dir() else ():
        if place.name not in wanted:
            shutil.rmtree(place, ignore_errors=True)
    if places.is_dir() and not any(places.iterdir()):
        places.rmdir()
