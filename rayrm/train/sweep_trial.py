"""[RAY] One trial of a sweep, as Ray Tune runs it: it watches a run that trains in a process of its own.

The run is `train_run` in a Ray task, with its workers or in the task's process; the trial reads what the run
writes and tells Tune each evaluation. A trial is never killed: one that is to stop tells its ranks to leave,
which save after the step they are in, and reports its end when they have left. So its workers, their
placement group and the directory are free before another trial takes its place. It is told by a file, since
a trial that waits for an evaluation takes no calls: `.stop` in its own directory, or in the sweep's for all
of them.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError

from rayrm.errors import ConfigError, PreemptedError, RayrmError, RunDirectoryError
from rayrm.runfile import Run
from rayrm.train.environment import adopt
from rayrm.train.holding import LOCK, holding
from rayrm.train.leg import Leg
from rayrm.train.preemption import tell_to_leave
from rayrm.train.sweep_record import curve_of, stands_at, value_of

STOP = ".stop"
VALUE, PROGRESS, FAILURE, ENDING = "value", "progress", "failure", "ending"
_LOOK_S = 0.3
_PATIENCE_S = 120.0


class Held:
    """A trial's run on its way through Tune, which prints and stores what it is given; or why there is
    none. `run`: Ray's reference to it, since what is stored must hold no token and no password. `leg`: the
    part of it that is to be trained, where that is not all."""

    def __init__(self, number: int, run: Any, refusal: str = "", leg: Leg | None = None) -> None:
        self.number, self.run, self.refusal, self.leg = number, run, refusal, leg

    def __repr__(self) -> str:
        return f"trial-{self.number:02d}"

    def __deepcopy__(self, memo: Any) -> Held:
        return self


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """Reports `{value, progress}` of each evaluation, `progress` in percent of the run's steps.

    The last report has `done`, and either `progress` 100, or `failure`, or `ending`: "stopped" by the
    scheduler (with the last value and progress), "paused" at its leg's end, "left" with the whole sweep.
    """

    def setup(
        self,
        config: dict[str, Any],
        home: str = "",
        metric: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        held: Held = config["held"]
        self._home, self._metric, self._refusal = Path(home), metric, held.refusal
        self._leg = held.leg
        self._last: dict[str, float] = {VALUE: math.nan, PROGRESS: 0.0}
        self._task: Any = None
        if held.run is not None:
            self._run: Run = ray.get(held.run)
            self._dir = Path(self._run.reward.output_dir or "")
            self._task = None if self._told(self._home) else _start(self._run, held.leg, environment or {})

    def step(self) -> dict[str, Any]:
        if self._refusal:
            return {VALUE: math.nan, FAILURE: self._refusal, "done": True}
        while self._task is not None and not self._is_done():
            if self._told(self._home) or self._told(self._dir):
                self._leave()
            elif seen := self._next():
                return seen
        return {**self._outcome(), "done": True}

    def cleanup(self) -> None:
        """Only where Tune itself gives up: a few seconds are all that it waits."""
        if self._task is not None:
            self._leave(patience_s=5.0)

    @staticmethod
    def _told(directory: Path) -> bool:
        return (directory / STOP).exists()

    def _is_done(self) -> bool:
        return bool(ray.wait([self._task], timeout=_LOOK_S)[0])

    def _next(self) -> dict[str, float] | None:
        """The first evaluation that was not told yet; that of the last step comes with the trial's end."""
        for progress, value in curve_of(self._dir, self._metric):
            if self._last[PROGRESS] < progress < 100.0:
                self._last = {VALUE: value, PROGRESS: progress}
                return dict(self._last)
        return None

    def _leave(self, patience_s: float = math.inf) -> None:
        """Until they have: a run that is about to begin takes the word away."""
        began = time.monotonic()
        while not self._is_done() and time.monotonic() - began < patience_s:
            tell_to_leave(self._dir)

    def _outcome(self) -> dict[str, Any]:
        if self._task is None:
            return {**self._last, ENDING: "left"}
        task, self._task = self._task, None
        try:
            ray.get(task)
            best = self._run.reward.load_best_model_at_end
            return {VALUE: value_of(self._dir, self._metric, loads_best=best), PROGRESS: 100.0}
        except RayTaskError as error:
            if isinstance(error.cause, PreemptedError) and self._told(self._home):
                return {**self._last, ENDING: "left"}
            if isinstance(error.cause, PreemptedError) and self._told(self._dir):
                return {**self._last, ENDING: "stopped"}
            if isinstance(error.cause, PreemptedError) and self._leg is not None:
                return self._paused(self._leg)
            said = str(error.cause) if isinstance(error.cause, RayrmError) else _told_by(error)
        except RayrmError as error:
            said = str(error)
        except RayError as error:  # the process was lost
            said = f"{type(error).__name__}: {_begun_by(str(error))}"
        return {VALUE: math.nan, FAILURE: said}

    def _paused(self, leg: Leg) -> dict[str, Any]:
        stands = None if leg.until is None else stands_at(self._dir, self._metric, leg.until)
        if stands is not None:
            return {VALUE: stands[1], PROGRESS: stands[0], ENDING: "paused"}
        try:
            value_of(self._dir, self._metric, loads_best=False)
        except ConfigError as error:
            return {VALUE: math.nan, FAILURE: str(error)}
        return {VALUE: math.nan, FAILURE: f"{self._dir} was told to leave, and not by this sweep"}


def _start(run: Run, leg: Leg | None, environment: Mapping[str, str]) -> Any:
    """The task that trains. It is not within the trial's own reservation, which is too small."""
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": "DEFAULT"}
    if run.cluster.num_workers == 0:
        gpu = ray.cluster_resources().get("GPU", 0.0) >= 1
        options |= {"num_cpus": 1, "num_gpus": 1 if gpu else 0}
    return ray.remote(**options)(_train).remote(run, leg, environment)


def _train(run: Run, leg: Leg | None, environment: Mapping[str, str]) -> None:
    from rayrm.train.launch import train_run

    adopt(environment)
    directory, began = Path(run.reward.output_dir or ""), time.monotonic()

    def wait(holder: str) -> None:
        if time.monotonic() - began > _PATIENCE_S:
            raise RunDirectoryError(
                f"an attempt that was cut off still trains in `{directory}` ({holder}); it has not ended in "
                f"{_PATIENCE_S:.0f} s. Kill it, then start the same sweep again."
            )
        time.sleep(_LOOK_S)

    # What a killed sweep left in the directory ends with its Ray, a moment later than the sweep itself.
    with holding(directory / LOCK, wait):
        pass
    train_run(run, leg=leg)


def _told_by(error: Exception) -> str:
    return last_line(str(error), type(error).__name__)


def _begun_by(text: str) -> str:
    """The beginning of what Ray says of a process that was lost; its advice follows, and is long."""
    return textwrap.shorten(" ".join(_lines(text)[:2]), 300, placeholder=" ...")


def last_line(text: str, otherwise: str) -> str:
    """The last line of an error's text that says something."""
    return (_lines(text) or [otherwise])[-1]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
