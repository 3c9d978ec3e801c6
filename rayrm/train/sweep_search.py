"""[RAY] What Ray Tune asks of a sweep: the next trial, whether one is to stop, and what ended.

The record (`sweep.json`) is the only memory: a sweep that goes on makes these anew and tells them what is
in it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayrm.errors import CheckpointError, ConfigError, MissingExtraError
from rayrm.runfile import Run
from rayrm.sweep_settings import Range, Space, SweepConfig
from rayrm.train.leg import Leg
from rayrm.train.sweep_plan import Words, values_by_key
from rayrm.train.sweep_record import Record, Trial, curve_of
from rayrm.train.sweep_trial import ENDING, FAILURE, PROGRESS, STOP, VALUE, Held, last_line

logger = logging.getLogger("rayrm.train")


class Suggestions(Protocol):
    """Where trials come from, beside those that were begun before."""

    def ask(self, number: int) -> Words:
        """The words of a new trial."""

    def again(self, number: int, words: Words) -> None:
        """A trial that was begun before is run again, or goes on."""

    def tell(self, number: int, trial: Trial, progress: float) -> None:
        """A trial ended, now or in an earlier start."""


class Planned:
    """The trials of a plan, in its order."""

    def __init__(self, plan: list[Words]) -> None:
        self._plan = plan

    def ask(self, number: int) -> Words:
        return self._plan[number - 1]

    def again(self, number: int, words: Words) -> None:
        """They are in the plan."""

    def tell(self, number: int, trial: Trial, progress: float) -> None:
        """No outcome changes it."""


class Optuna:
    """Suggestions of Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), by ask and tell."""

    def __init__(self, space: Space, sweep: SweepConfig, seed: int, num_before: int) -> None:
        """`num_before`: trials of earlier starts, so that their draws are not drawn again."""
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError(
                '`sweep.search` "optuna" needs optuna. Type: pip install "optuna>=4"'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, space
        self._distributions = {key: self._distribution(values) for key, values in space.items()}
        self._study = optuna.create_study(
            direction="maximize" if sweep.direction == "max" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=(seed + num_before) % 2**32),
        )
        self._asked: dict[int, Any] = {}

    def ask(self, number: int) -> Words:
        self._asked[number] = self._study.ask(fixed_distributions=self._distributions)
        values = self._asked[number].params
        # All digits: the words are read back when the sweep goes on.
        return tuple(f"{key}={values[key]}" for key in self._space)

    def again(self, number: int, words: Words) -> None:
        self._study.enqueue_trial(values_by_key(self._space, words))
        self._asked[number] = self._study.ask(fixed_distributions=self._distributions)

    def tell(self, number: int, trial: Trial, progress: float) -> None:
        states = self._optuna.trial.TrialState
        asked = self._asked.pop(number, None)
        if asked is None:
            self.again(number, trial.words)
            asked = self._asked.pop(number)
        if trial.metric is None or not math.isfinite(trial.metric):
            self._study.tell(asked, state=states.FAIL)
        elif trial.stopped_at is not None:
            asked.report(trial.metric, step=int(progress))
            self._study.tell(asked, state=states.PRUNED)
        else:
            self._study.tell(asked, trial.metric)

    def _distribution(self, values: tuple[str, ...] | Range) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(values, Range):
            return kinds.CategoricalDistribution(values)
        if values.kind == "int":
            return kinds.IntDistribution(int(values.low), int(values.high))
        return kinds.FloatDistribution(values.low, values.high, log=values.kind == "log")


class Search(Searcher):  # type: ignore[misc]
    """Tune's searcher: the trials that were cut off first, then new ones, until there are `num_trials`."""

    def __init__(
        self,
        record: Record,
        source: Suggestions,
        *,
        again: Iterable[int],
        new: Iterable[int],
        run_of: Callable[[int, Words], Run],
        mode: str,
        hand_over: Callable[[Run], Any],
        leg: Leg | None = None,
    ) -> None:
        """`leg`: the part of each trial's run that is to be trained, where that is not all. `hand_over` makes
        of a run what the trial has it by: Tune writes what it is told of trials, and a run holds secrets."""
        super().__init__(metric=VALUE, mode=mode)
        self._leg, self._hand_over = leg, hand_over
        self._record, self._source, self._run_of = record, source, run_of
        self._again, self._new = deque(again), deque(new)

    def suggest(self, trial_id: str) -> Any:
        if (self._record.home / STOP).exists():
            return Searcher.FINISHED
        if self._again:
            number = self._again.popleft()
            words = self._record.trials[number].words
            (self._record.directory(number) / STOP).unlink(missing_ok=True)
            self._source.again(number, words)
        elif self._new:
            number = self._new.popleft()
            words = self._source.ask(number)
            self._record.begin(number, words)
        else:
            return Searcher.FINISHED
        try:
            held = Held(number, self._hand_over(self._run_of(number, words)), leg=self._leg)
        except (ConfigError, CheckpointError) as error:
            held = Held(number, None, str(error))
        return {"number": number, "held": held}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """`Ends` tells the source."""

    def __getstate__(self) -> dict[str, Any]:
        """Of what Tune writes down, and never reads: without the runs, and the file that makes them."""
        return {name: one for name, one in vars(self).items() if name not in ("_run_of", "_hand_over")}

    def save(self, checkpoint_path: str) -> None:
        """The record is what is kept; Tune moves this file to its place."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on by its own record")


class Ends(tune.Callback):  # type: ignore[misc]
    """Writes down how trials end, and tells the search."""

    def __init__(self, record: Record, source: Suggestions, num_trials: int) -> None:
        self._record, self._source, self._num_trials = record, source, num_trials

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last, number = trial.last_result, trial.config["number"]
        if last.get(ENDING) == "left":
            return  # it goes on at the next start
        if last.get(ENDING) == "paused":
            at, name = last[PROGRESS], self._record.directory(number).name
            logger.info("%s: %.4f at %.0f%% of its steps", name, last[VALUE], at)
            return  # the population decides
        if FAILURE in last:
            self._end(number, 0.0, failure=last[FAILURE])
        elif last.get(ENDING) == "stopped":
            self._end(number, last[PROGRESS], metric=last[VALUE], stopped_at=last[PROGRESS])
        else:
            self._end(number, 100.0, metric=last[VALUE])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        said = last_line(str(trial.get_error() or ""), "its process was lost")
        self._end(trial.config["number"], 0.0, failure=said)

    def _end(self, number: int, progress: float, **outcome: Any) -> None:
        (self._record.directory(number) / STOP).unlink(missing_ok=True)
        ended = self._record.end(number, **outcome)
        self._source.tell(number, ended, progress)
        done = sum(trial.ended for trial in self._record.trials.values())
        how = f"failed: {ended.failure}" if ended.metric is None else f"{ended.metric:.4f}"
        if ended.stopped_at is not None:
            how += f", stopped at {ended.stopped_at:.0f}% of its steps"
        logger.info(
            "%s (%s): %s; %d of %d trials are done",
            ended.directory.name,
            " ".join(ended.words),
            how,
            done,
            self._num_trials,
        )


class Halving(ASHAScheduler):  # type: ignore[misc]
    """Ray Tune's asynchronous successive halving; a trial that it stops is told to leave, see
    `SweepTrial`."""

    def __init__(self, record: Record, sweep: SweepConfig) -> None:
        self._record = record
        super().__init__(
            time_attr=PROGRESS,
            metric=VALUE,
            mode=sweep.direction,
            max_t=100,
            grace_period=sweep.grace,
            reduction_factor=sweep.reduction,
        )

    def remember(self, number: int, metric: str) -> None:
        """Tell it what a trial that ended in an earlier start reported."""
        seen, ended = SimpleNamespace(trial_id=f"before-{number}"), self._record.trials[number]
        self.on_trial_add(None, seen)
        for progress, value in curve_of(ended.directory, metric):
            if progress < 100.0:
                super().on_trial_result(None, seen, {PROGRESS: progress, VALUE: value})
        self.on_trial_complete(None, seen, {PROGRESS: ended.stopped_at or 100.0, VALUE: ended.metric})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            (self._record.directory(trial.config["number"]) / STOP).touch()
        return str(TrialScheduler.CONTINUE)
