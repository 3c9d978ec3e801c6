"""[RAY] A sweep: one run file, several values of some of its keys, one Ray Tune trial for each combination.

The trials are planned here, before anything starts: a grid of listed values times seeded draws from ranges,
each a list of `key=value` words and a valid `Run`. Each trial trains in a directory of its own,
`<output_dir>/trial-<number>`, with the run's workers or, without workers, in a process of its own. A trial
that fails ends itself only. `sweep.json` beside them holds the table. A sweep begins in an empty directory
and does not resume; a single trial does, by `rayrm train` on its `run.toml`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrm.errors import ConfigError, RayrmError, RunDirectoryError
from rayrm.runfile import Run, read_run
from rayrm.train.launch import TrainSummary, join_cluster, train_run, with_absolute_paths

Mode = Literal["max", "min"]
SUMMARY = "sweep.json"
_RANGES: dict[str, Callable[[random.Random, float, float], float]] = {
    "log": lambda draw, low, high: math.exp(draw.uniform(math.log(low), math.log(high))),
    "uniform": lambda draw, low, high: draw.uniform(low, high),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one combination: its metric, or why it has none."""

    words: tuple[str, ...]
    """The overrides that make it, as typed: `learning_rate=1e-5`."""
    directory: Path
    metric: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials in the order of the plan, and the best (None where every trial failed)."""

    metric: str
    trials: list[Trial]
    best: Trial | None


def plan_trials(params: Sequence[str], num_trials: int | None, seed: int) -> list[tuple[str, ...]]:
    """The trials' overrides: every combination of listed values, each with `num_trials` draws of the ranges.

    `params`: `key=a,b,c` lists values (as TOML values: commas inside brackets or quotes do not count);
    `key=log:LOW:HIGH` and `key=uniform:LOW:HIGH` are ranges.

    Raises:
        ConfigError: neither of these, a key given twice, ranges without `num_trials`, or the reverse.
    """
    lists: dict[str, list[str]] = {}
    ranges: dict[str, tuple[str, float, float]] = {}
    for param in params:
        key, equals, text = param.partition("=")
        if not equals or not key or not text:
            raise ConfigError(
                f"param `{param}` must be key=values. Type for example `learning_rate=1e-5,3e-5`."
            )
        if key in lists or key in ranges:
            raise ConfigError(f"param `{key}` is given twice. Put all its values into one `--param`.")
        if text.partition(":")[0] in _RANGES:
            ranges[key] = _range(param, text)
        else:
            lists[key] = _split(text)
    if not params:
        raise ConfigError("a sweep needs a parameter. Type for example `--param learning_rate=1e-5,3e-5`.")
    if ranges and num_trials is None:
        raise ConfigError(f"param `{next(iter(ranges))}` is a range: say how many draws. Type `--trials 8`.")
    if num_trials is not None and (not ranges or num_trials < 1):
        raise ConfigError(
            f"`--trials` ({num_trials}) is the number of draws from ranges, at least 1, and there is "
            f"{'one' if ranges else 'none'}. Leave it out for lists of values, or type a range: "
            "`learning_rate=log:1e-6:1e-4`."
        )
    draw = random.Random(seed)
    plan = []
    for values in itertools.product(*lists.values()):
        listed = [f"{key}={value}" for key, value in zip(lists, values, strict=True)]
        for _ in range(num_trials or 1):
            drawn = [
                f"{key}={_RANGES[kind](draw, low, high):.4g}" for key, (kind, low, high) in ranges.items()
            ]
            plan.append((*listed, *drawn))
    return plan


def run_sweep(
    path: str | Path | None,
    overrides: Sequence[str],
    params: Sequence[str],
    *,
    num_trials: int | None = None,
    metric: str = "eval_accuracy",
    mode: Mode = "max",
    max_concurrent: int | None = None,
) -> Sweep:
    """Train every trial on the cluster and name the best by the last value of `metric`.

    `max_concurrent` None: as many as the cluster has CPUs (GPUs) for.

    Raises:
        ConfigError: a parameter or a trial's settings are wrong. RunDirectoryError: `output_dir` is not
            empty. Nothing was started.
        RayrmError: every trial failed; the message has the reasons.
    """
    base = with_absolute_paths(read_run(path, overrides))
    home = Path(base.reward.output_dir or "")
    words = plan_trials(params, num_trials, base.reward.seed)
    runs = [
        _trial_run(read_run(path, [*overrides, *trial]), home, number, metric)
        for number, trial in enumerate(words, start=1)
    ]
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise RunDirectoryError(
            f"`output_dir` ({home}) is not empty, and a sweep overwrites nothing. Type another: "
            f"`output_dir={home}-2`."
        )
    join_cluster(base.cluster.address)
    home.mkdir(parents=True, exist_ok=True)
    trials = _fit(home, words, runs, metric, max_concurrent or _fitting(base))
    sweep = Sweep(metric, trials, best_of(trials, mode))
    (home / SUMMARY).write_text(json.dumps(dataclasses.asdict(sweep), indent=2, default=str) + "\n")
    if sweep.best is None:
        reasons = "\n".join(f"  {' '.join(trial.words)}: {trial.failure}" for trial in trials)
        raise RayrmError(f"every trial failed:\n{reasons}")
    return sweep


def best_of(trials: Sequence[Trial], mode: Mode) -> Trial | None:
    """The trial with the best metric, the first of equals; failed trials do not take part."""
    sign = 1.0 if mode == "max" else -1.0
    done = [
        (sign * trial.metric, -number, trial)
        for number, trial in enumerate(trials)
        if trial.metric is not None
    ]
    return max(done)[2] if done else None


def _trial_run(run: Run, home: Path, number: int, metric: str) -> Run:
    reward = dataclasses.replace(run.reward, output_dir=str(home / f"trial-{number:02d}"), disable_tqdm=True)
    if metric.startswith("eval_"):
        if run.data.eval is None:
            raise ConfigError(
                f"`--metric` ({metric}) is measured on an evaluation set, and `data.eval` is not set. Type "
                "`data.eval=FILE`, or `--metric train_loss --mode min`."
            )
        if reward.eval_strategy == "no":
            reward = dataclasses.replace(reward, eval_strategy="epoch")
    return with_absolute_paths(dataclasses.replace(run, reward=reward))


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


def _fit(
    home: Path, words: Sequence[tuple[str, ...]], runs: Sequence[Run], metric: str, max_concurrent: int
) -> list[Trial]:
    """Run the trials by Ray Tune; a trial's outcome comes back as its last report."""
    from ray import tune

    trainable = tune.with_parameters(_train_trial, runs=list(runs), metric=metric)
    tuner = tune.Tuner(
        # A trial only waits: what trains reserves its own CPUs. A share of one would keep the workers of a
        # small cluster waiting, and nothing at all is refused: so a little memory.
        tune.with_resources(trainable, {"memory": 2**20}),
        param_space={"trial": tune.grid_search(list(range(len(runs))))},
        # The limit keeps drivers from taking the CPUs that other trials' workers wait for.
        tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent),
        run_config=tune.RunConfig(name=".tune", storage_path=str(home), verbose=0),
    )
    trials: dict[int, Trial] = {}
    for outcome in tuner.fit():
        number = outcome.config["trial"]
        last = outcome.metrics or {}
        failure = last.get("failure")
        if outcome.error is not None:
            failure = str(outcome.error).strip().splitlines()[-1]
        value = None if failure else last.get("value")
        if value is None and failure is None:
            failure = "the trial ended without a result; its log is in the Ray session's directory"
        trials[number] = Trial(words[number], Path(runs[number].reward.output_dir or ""), value, failure)
    return [trials[number] for number in range(len(runs))]


def _train_trial(config: dict[str, Any], runs: list[Run], metric: str) -> None:
    """What a Ray Tune trial runs. A refusal is reported as such, not as a stack trace."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    run = runs[config["trial"]]
    try:
        if run.cluster.num_workers:
            summary = train_run(run, callbacks=[TuneReportCallback()])
        else:
            summary = _train_in_a_task(run)
        tune.report({"value": _value(summary, metric)})
    except RayrmError as error:
        tune.report({"failure": str(error)})


def _train_in_a_task(run: Run) -> TrainSummary:
    """`train_run` in a process of its own: in a trial's process Ray Train answers as Ray Tune."""
    import ray
    from ray.exceptions import RayTaskError

    gpu = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1 else 0.0
    # DEFAULT: not within the trial's own reservation, which is too small.
    options = {"num_cpus": 1.0, "num_gpus": gpu, "max_retries": 0, "scheduling_strategy": "DEFAULT"}
    try:
        summary: TrainSummary = ray.get(ray.remote(**options)(train_run).remote(run))
    except RayTaskError as error:
        raise error.cause from None
    return summary


def _value(summary: TrainSummary, metric: str) -> float:
    if metric not in summary.metrics:
        known = ", ".join(sorted(key for key in summary.metrics if key not in ("step", "epoch")))
        raise ConfigError(f"`--metric` ({metric}) was not logged. Type one of {known}.")
    return float(summary.metrics[metric])


def _range(param: str, text: str) -> tuple[str, float, float]:
    try:
        kind, low_text, high_text = text.split(":")
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise ConfigError(
            f"param `{param}` must be KIND:LOW:HIGH with two numbers. Type for example "
            "`learning_rate=log:1e-6:1e-4`."
        ) from None
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (kind == "log" and low <= 0):
        raise ConfigError(
            f"param `{param}`: LOW ({low:g}) must be below HIGH ({high:g})"
            f"{', and above 0 for a log range' if kind == 'log' else ''}. Type the smaller first."
        )
    return kind, low, high


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
