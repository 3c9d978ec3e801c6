"""[RAY] A sweep: one run file, several values of some of its keys, one Ray Tune trial for each combination.

Each trial trains in a directory of its own, `<output_dir>/trial-<number>`, with the run's workers or, without
workers, in a process of its own. A trial that fails ends itself only. `sweep.json` beside them is the
record: the same sweep given again goes on where it was cut off, and of a finished one it tells the outcome.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrm.data.sources import plan_sources
from rayrm.errors import ConfigError, PreemptedError, RayrmError, RunDirectoryError
from rayrm.logs import show_logs
from rayrm.model.reward_model import check_name
from rayrm.own_ray import join_cluster, keeping_handlers
from rayrm.runfile import Run, dump_run
from rayrm.sweep_settings import Range, Space, SweepFile, space_of, space_of_params
from rayrm.train.environment import environment_of
from rayrm.train.given import check_places
from rayrm.train.launch import with_absolute_paths
from rayrm.train.leg import Leg
from rayrm.train.rundir import only_run, read_finished
from rayrm.train.storage import below, storage_environment, storage_of
from rayrm.train.sweep_plan import (
    Words,
    check_base,
    check_population,
    check_space,
    corners,
    in_order,
    plan_trials,
)
from rayrm.train.sweep_record import Record, Sweep, value_of

logger = logging.getLogger("rayrm.train")
_TUNE = ".tune"


def run_sweep(file: SweepFile, params: Sequence[str] = ()) -> Sweep:
    """Train every trial on the cluster; the best has the best `metric` of those that came to their end.

    `file`: what `read_sweep` read. `params`: `key=values` words over its space, see `space_of_params`. The
    same call goes on with a sweep that was cut off; trials that failed are tried again.

    Raises:
        ConfigError: a parameter or a trial's settings are wrong. Nothing was started.
        RunDirectoryError: `output_dir` holds something else, or another process's sweep.
        PreemptedError, KeyboardInterrupt: SIGTERM or Ctrl-C; the trials have saved and left.
        RayrmError: every trial failed; the message has the reasons.
    """
    show_logs()
    planned = _Plan(file, params)
    with only_run(planned.home):
        record = Record(planned.home, planned.sweep.metric, planned.sweep.direction, planned.identity)
        planned.take_in_finished(record)
        if left := planned.left(record):
            planned.check_places(begins=not record.trials)
            if record.trials:
                logger.info(
                    "going on with the sweep in %s: %d of %d trials to go",
                    planned.home,
                    len(left),
                    planned.num_trials,
                )
            if planned.sweep.scheduler == "pbt":
                _train_population(planned, record)
            else:
                _fit(planned, record, left)
        record.write()
    sweep = record.sweep
    if sweep.best is None:
        reasons: dict[str | None, list[str]] = {}
        for trial in sweep.trials:
            reasons.setdefault(trial.failure, []).append(" ".join(trial.words))
        told = "\n".join(f"  {'; '.join(which)}: {why}" for why, which in reasons.items())
        raise RayrmError(f"every trial failed:\n{told}")
    return sweep


class _Plan:
    """What a sweep is to do, checked before anything is written or started."""

    def __init__(self, file: SweepFile, params: Sequence[str]) -> None:
        self._file = file
        run, self.sweep = file.read()
        self.base = with_absolute_paths(run)
        self.home = Path(self.base.reward.output_dir or "")
        self.space: Space = in_order({**space_of(self.sweep.space), **space_of_params(params)})
        check_space(self.space, self.sweep)
        check_base(run, self.sweep, os.environ)
        self.seed = self.base.reward.seed if self.sweep.seed is None else self.sweep.seed
        if self.sweep.search == "optuna":
            self.trials: list[Words] | None = None
            self.num_trials = self.sweep.num_trials or 0
            tried = corners(self.space)
        else:
            self.trials = tried = plan_trials(self.space, self.sweep, self.seed)
            self.num_trials = len(self.trials)
        if self.sweep.scheduler == "pbt":
            check_population(self.space, self.num_trials)
        for words in tried:
            self.run_of(1, words)

    def run_of(self, number: int, words: Words, directory: Path | None = None) -> Run:
        """A trial's run, in its first directory or another. Raises ConfigError where its words make none."""
        run, _ = self._file.read(words)
        sweep = self.sweep
        home = directory or self.home / f"trial-{number:02d}"
        name, store = run.reward.run_name or self.home.name, run.reward.storage_path
        reward = dataclasses.replace(
            run.reward,
            output_dir=str(home),
            disable_tqdm=True,
            run_name=f"{name}-{home.name}",
            # Under the names of their directories alone the trials of all sweeps would be one another's.
            storage_path=None if store is None else below(store, self.home.name),
        )
        if sweep.metric.startswith("eval_"):
            if run.data.eval is None and not run.data.eval_fraction:
                raise ConfigError(
                    f"`sweep.metric` ({sweep.metric}) is measured on an evaluation set, and `data.eval` is "
                    "not set. Type `data.eval=FILE`, or `--metric train_loss`."
                )
            if reward.eval_strategy == "no":
                reward = dataclasses.replace(reward, eval_strategy="epoch")
        once = reward.eval_strategy == "epoch" and reward.num_train_epochs <= 1
        if sweep.scheduler != "none" and once:
            does = {"asha": "stops", "pbt": "compares"}[sweep.scheduler]
            raise ConfigError(
                f'`sweep.scheduler` "{sweep.scheduler}" {does} trials by their evaluations, and each trial '
                "has one, at its end. Type for example `eval_strategy=steps eval_steps=0.1`, or "
                '`sweep.scheduler="none"`.'
            )
        for name in ("load_best_model_at_end", "resume_from_checkpoint"):
            if sweep.scheduler == "pbt" and getattr(reward, name):
                raise ConfigError(
                    f'`{name}` ({getattr(reward, name)}): with `sweep.scheduler` "pbt" each trial begins at '
                    "its first step, and its model is that of its last. Leave it out."
                )
        return with_absolute_paths(dataclasses.replace(run, reward=reward))

    @property
    def identity(self) -> dict[str, Any]:
        """What two starts of one sweep have in common: not where it runs and what becomes of the best."""
        sweep = {**dataclasses.asdict(self.sweep), "mode": self.sweep.direction}
        free = {"max_concurrent", "publish", "registry", "space", "seed"}
        if self.sweep.scheduler != "pbt":
            free |= {"perturb_every", "quantile"}
            if self.sweep.search != "grid":
                free.add("num_trials")  # more draws leave the first as they were
        space = {
            key: f"{values.kind}:{values.low:g}:{values.high:g}" if isinstance(values, Range) else values
            for key, values in self.space.items()
        }
        told = tomllib.loads(dump_run(self.base))
        run = {
            f"{section}.{key}": value
            for section in ("model", "data", "reward")
            for key, value in told[section].items()
            if key not in ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps")
        }
        return {
            **run,
            # As of a run: what they make together with the number of workers.
            "rows_per_step": self.base.reward.train_batch_rows(self.base.cluster.num_workers),
            **{f"sweep.{key}": value for key, value in sweep.items() if key not in free},
            "sweep.seed": self.seed,
            **{f"sweep.space.{key}": values for key, values in space.items()},
        }

    def check_places(self, *, begins: bool) -> None:
        """Raise where the directory, the store or a tracker takes nothing, or, where the sweep `begins`, the
        store holds trials of another."""
        reward = self.base.reward
        check_places(reward, self.home)
        store = storage_of(reward, self.home, storage_environment(reward))
        if begins and store is not None and store.is_used():
            raise RunDirectoryError(
                f"`{store.url}` holds trials of a sweep already, and the record by which a sweep goes on is "
                f"not in `{self.home}`. Choose another `output_dir`: its last part is the sweep's name there."
            )
        self._check_shared()

    def _check_shared(self) -> None:
        """Raise for a model or data that all trials have in common and none could use."""
        run = self.base
        if not self.space.keys() & {"model.name", "model_init_kwargs"}:
            init = run.reward.model_init_kwargs or {}
            check_name(run.model.name, init, trust_remote_code=run.reward.trust_remote_code)
        sets = run.data.eval if isinstance(run.data.eval, dict) else {"eval": run.data.eval}
        train = [] if "data.train" in self.space else [("train", run.data.train)]
        for name, source in [*train, *sets.items()]:
            if source is not None:
                plan_sources(source, max_rows=None, name=name, columns=run.data.columns)

    def take_in_finished(self, record: Record) -> None:
        """A trial that came to its end just before a kill is not run again."""
        for number, trial in record.trials.items():
            if not trial.ended and read_finished(trial.directory):
                best = self.run_of(number, trial.words).reward.load_best_model_at_end
                metric = value_of(trial.directory, self.sweep.metric, loads_best=best)
                record.trials[number] = dataclasses.replace(trial, metric=metric)

    def left(self, record: Record) -> list[int]:
        """Numbers of the trials that are to run, those begun before first."""
        begun = [number for number, trial in record.trials.items() if not trial.ended]
        return begun + [number for number in range(1, self.num_trials + 1) if number not in record.trials]


def _train_population(plan: _Plan, record: Record) -> None:
    from rayrm.train.sweep_population import going_on, train_population

    def train(numbers: list[int], leg: Leg) -> None:
        def run_of(number: int, words: Words) -> Run:
            return going_on(plan.run_of(number, words, record.directory(number)), plan.home)

        _fit(plan, record, numbers, run_of=run_of, leg=leg)

    train_population(record, plan.space, plan.sweep, plan.seed, plan.num_trials, train)


def _fit(
    plan: _Plan,
    record: Record,
    left: list[int],
    *,
    run_of: Callable[[int, Words], Run] | None = None,
    leg: Leg | None = None,
) -> None:
    """Run what is left by Ray Tune, until all is done or this process is told to leave."""
    import ray
    from ray import tune

    from rayrm.train.sweep_search import Ends, Halving, Optuna, Planned, Search
    from rayrm.train.sweep_trial import STOP, SweepTrial

    join_cluster(plan.base.cluster.address)
    sweep, home = plan.sweep, plan.home
    source = (
        Optuna(plan.space, sweep, plan.seed, len(record.trials))
        if plan.trials is None
        else Planned(plan.trials)
    )
    scheduler = Halving(record, sweep) if sweep.scheduler == "asha" else None
    for number, trial in sorted(record.trials.items()):
        if trial.ended:
            source.tell(number, trial, trial.stopped_at or 100.0)
            if scheduler is not None:
                scheduler.remember(number, sweep.metric)
    home.mkdir(parents=True, exist_ok=True)
    (home / STOP).unlink(missing_ok=True)
    shutil.rmtree(home / _TUNE, ignore_errors=True)
    record.write()
    ends = Ends(record, source, plan.num_trials)
    search = Search(
        record,
        source,
        again=[number for number in left if number in record.trials],
        new=[number for number in left if number not in record.trials],
        run_of=run_of or plan.run_of,
        mode=sweep.direction,
        leg=leg,
        hand_over=ray.put,
    )
    trainable = tune.with_parameters(
        SweepTrial, home=str(home), metric=sweep.metric, environment=environment_of(plan.base.reward)
    )
    with _tune_set(), _leaving(home / STOP) as told:
        tune.Tuner(
            # A trial only waits: what trains reserves its own CPUs. A share of one would keep the workers of
            # a small cluster waiting, and nothing at all is refused: so a little memory.
            tune.with_resources(trainable, {"memory": 2**20}),
            tune_config=tune.TuneConfig(
                num_samples=len(left),
                search_alg=search,
                scheduler=scheduler,
                # The limit keeps trials from taking the CPUs that other trials' workers wait for.
                max_concurrent_trials=_concurrent(plan),
                trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:02d}",
            ),
            run_config=tune.RunConfig(
                name=_TUNE,
                storage_path=str(home),
                verbose=0,
                callbacks=[ends],
                # The runs keep their own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    shutil.rmtree(home / _TUNE, ignore_errors=True)
    if not told or not plan.left(record):
        return
    if told[0] == signal.SIGINT:
        raise KeyboardInterrupt
    done = sum(trial.ended for trial in record.trials.values())
    raise PreemptedError(
        f"told to leave (SIGTERM), the sweep in {home} has {done} of {plan.num_trials} trials done, and the "
        "others have saved. The same command goes on from there."
    )


def _concurrent(plan: _Plan) -> int:
    """How many trials run at once: what was asked for, where the cluster has room for it."""
    fitting, asked = _fitting(plan.base), plan.sweep.max_concurrent
    if asked is not None and asked > fitting:
        logger.warning(
            "`sweep.max_concurrent` (%d): the cluster has room for %d at once, so many run", asked, fitting
        )
    return min(fitting, asked or fitting)


def _fitting(run: Run) -> int:
    """How many trials the cluster has room for; one CPU is left for reading the data."""
    import ray

    have = ray.cluster_resources()
    each = dict(run.cluster.resources_per_worker or ({"GPU": 1.0} if run.cluster.use_gpu else {"CPU": 1.0}))
    workers = max(1, run.cluster.num_workers)
    fits = [
        (have.get(name, 0.0) - (1.0 if name == "CPU" else 0.0)) // (amount * workers)
        for name, amount in each.items()
        if amount > 0
    ]
    return max(1, int(min(fits, default=1.0)))


@contextmanager
def _leaving(word: Path) -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM make the trials leave; the second does what it did before.

    Gives the signals that came.
    """
    told: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        for one, handler in kept.items():
            signal.signal(one, handler or signal.SIG_DFL)
        word.touch()
        logger.warning("the trials save and leave; once more to end at once")

    try:
        with keeping_handlers(signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():
                for number in kept:
                    signal.signal(number, tell)
            yield told
    finally:
        word.unlink(missing_ok=True)


@contextmanager
def _tune_set() -> Iterator[None]:
    """Within the block Tune leaves Ctrl-C to us (it would kill the trials, and their workers with them, in
    the middle of a step), and tables and hints to `rayrm sweep`."""
    ours = {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
