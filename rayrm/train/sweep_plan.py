"""Which trials a grid or a random search has: pure, seeded, before anything starts.

A trial is the words (`learning_rate=1e-5`) that make its run of the sweep's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rayrm.errors import ConfigError
from rayrm.metrics.names import logged_names, prefix_of
from rayrm.objective import OBJECTIVE_SETTINGS
from rayrm.runfile import Run
from rayrm.settings import nearest
from rayrm.sweep_settings import Range, Space, SweepConfig
from rayrm.train.leg import MAY_CHANGE

Words = tuple[str, ...]
_MEASURED: Final = "trials that are measured on different rows cannot be compared"
_FIXED: Final = {
    "output_dir": "each trial has a directory of its own in the sweep's",
    "run_name": "each trial's is made of the sweep's and its own number",
    "disable_tqdm": "trials have no progress bar",
    "resume_from_checkpoint": "a sweep goes on by its own record",
    "storage_path": "one store holds all trials of a sweep",
    "data.eval": _MEASURED,
    "data.eval_fraction": _MEASURED,
    "data.max_eval_pairs": _MEASURED,
    "cluster.address": "a sweep runs on one cluster",
    "sweep": "it says how trials are made",
    "serve": "training does not read it",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_revision"),
        "trials are not pushed to the hub",
    ),
}
"""What cannot be another value in each trial, and why; with all that stands below it."""


def in_order(space: Space) -> Space:
    """By key: written in another order a space is the same, with the same trials in the same order.

    Raises:
        ConfigError: a key that is given twice, with and without its section.
    """
    found: Space = {}
    for key, values in space.items():
        name = key.removeprefix("reward.")
        if name in found:
            raise ConfigError(f"`space.{name}` and `space.reward.{name}` are one setting. Give one of them.")
        found[name] = values
    return dict(sorted(found.items()))


def check_base(run: Run, sweep: SweepConfig, environment: Mapping[str, str]) -> None:
    """Raise ConfigError for what makes a run, and would make its trials one.

    `environment`: of the process that starts the sweep.
    """
    if run.reward.push_to_hub:
        name = sweep.publish or "NAME"
        raise ConfigError(
            "`push_to_hub` (True): each trial of a sweep would push its own model. Leave it out, and push "
            f"the best model at the end: type `sweep.publish={name}`, and then `hf upload REPOSITORY "
            f"{sweep.registry}/{name}/VERSION`."
        )
    for tool, variable in (("wandb", "WANDB_RUN_ID"), ("mlflow", "MLFLOW_RUN_ID")):
        if tool in run.reward.report_to and variable in environment:
            raise ConfigError(
                f"{variable} ({environment[variable]}) is set in the environment, and names one run of "
                f"{tool}: each trial of a sweep has its own. Type `unset {variable}`."
            )
    _check_metric(run, sweep.metric)


def _check_metric(run: Run, metric: str) -> None:
    """Raise ConfigError for a metric that no trial would log: it would be missed when the first has ended."""
    sets = list(run.data.eval) if isinstance(run.data.eval, dict) else [""]
    prefixes = tuple(map(prefix_of, sets))
    if metric.startswith("eval_") and not metric.startswith(prefixes):
        raise ConfigError(
            f"`sweep.metric` ({metric}) is of no evaluation set: those of `data.eval` have names. "
            f"Type for example `--metric {prefixes[0]}{metric.removeprefix('eval_')}`."
        )
    known = logged_names(sets, run.reward.attributes)
    if metric not in known:
        shown = ", ".join(prefixes[0] + name for name in ("accuracy", "loss", "margin"))
        raise ConfigError(
            f"`sweep.metric` ({metric}) is nothing that a run logs.{nearest(metric, known)} Type for example "
            f"one of {shown}."
        )


def check_space(space: Space, sweep: SweepConfig) -> None:
    """Raise ConfigError where the search has nothing to search, or does not know for how long."""
    if not space:
        raise ConfigError(
            "a sweep needs a parameter. Type for example `--param learning_rate=1e-5,3e-5`, or in the run "
            "file [sweep.space] and below it `learning_rate = [1e-5, 3e-5]`."
        )
    _check_keys(space, sweep)
    drawn = sweep.search != "grid" or any(isinstance(values, Range) for values in space.values())
    key = next((key for key, values in space.items() if isinstance(values, Range)), next(iter(space)))
    if drawn and sweep.num_trials is None:
        what = f"param `{key}` is a range" if sweep.search == "grid" else f'search "{sweep.search}" draws'
        raise ConfigError(f"{what}: say how many draws. Type `--trials 8` (`sweep.num_trials=8`).")
    if not drawn and sweep.num_trials is not None:
        raise ConfigError(
            f"`num_trials` ({sweep.num_trials}) is the number of draws from ranges, and there is none. Leave "
            "it out for lists of values, type a range (`learning_rate=log:1e-6:1e-4`), or "
            '`sweep.search="random"`.'
        )


def _check_keys(space: Space, sweep: SweepConfig) -> None:
    for key in space:
        for fixed, why in _FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise ConfigError(f"`space.{key}` cannot vary: {why}. Set it outside of the space.")
        if key in OBJECTIVE_SETTINGS and sweep.metric.endswith("loss"):
            raise ConfigError(
                f"`space.{key}` changes what `sweep.metric` ({sweep.metric}) is, so that trials would not be "
                "compared by one measure. Type `sweep.metric=eval_accuracy`, or set it outside of the space."
            )


def check_population(space: Space, num_trials: int) -> None:
    """Raise ConfigError where population based training has nobody to compare, or would change what can't be
    changed in a run's middle."""
    fixed = [key for key in space if key.removeprefix("reward.") not in MAY_CHANGE]
    if fixed:
        raise ConfigError(
            f'`sweep.scheduler` "pbt" changes values in the middle of a run, and `{"`, `".join(fixed)}` must '
            "stay: another value is another model, other rows or other steps than the checkpoint's. It "
            f"changes {', '.join(sorted(MAY_CHANGE))}. Set the others outside of the space, or type "
            '`sweep.scheduler="asha"`.'
        )
    if num_trials < 2:
        raise ConfigError(
            '`sweep.scheduler` "pbt" compares trials with each other, and there is one. Type '
            "`sweep.num_trials=8`."
        )


def plan_trials(space: Space, sweep: SweepConfig, seed: int) -> list[Words]:
    """The trials of a grid or of a random search, in their order. More draws leave the first as they were
    in a random search."""
    draw = random.Random(seed)
    if sweep.search == "random":
        draws = {key: _draws(values, draw) for key, values in space.items()}
        return [
            tuple(f"{key}={next(values)}" for key, values in draws.items())
            for _ in range(sweep.num_trials or 0)
        ]
    lists = {key: values for key, values in space.items() if not isinstance(values, Range)}
    ranges = {key: values for key, values in space.items() if isinstance(values, Range)}
    plan: list[Words] = []
    for values in itertools.product(*lists.values()):
        listed = [f"{key}={value}" for key, value in zip(lists, values, strict=True)]
        for _ in range(sweep.num_trials or 1):
            plan.append((*listed, *(f"{key}={range_.draw(draw)}" for key, range_ in ranges.items())))
    return plan


def corners(space: Space) -> list[Words]:
    """Words that try every listed value once, and both ends and an inner value of every range: each must make
    a run."""
    kept: Mapping[str, tuple[str, ...]] = {
        key: values.examples() if isinstance(values, Range) else values for key, values in space.items()
    }
    longest = max(map(len, kept.values()))
    return [
        tuple(f"{key}={values[min(place, len(values) - 1)]}" for key, values in kept.items())
        for place in range(longest)
    ]


def values_by_key(space: Space, words: Words) -> dict[str, Any]:
    """What a trial's words set: numbers of ranges, and of lists the words that they have."""
    found: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        allowed = space[key]
        found[key] = allowed.number(text) if isinstance(allowed, Range) else text
    return found


def _draws(values: tuple[str, ...] | Range, draw: random.Random) -> Iterator[str]:
    """Without end. Of a list each value comes once before any comes again, so that a few trials try all."""
    while True:
        if isinstance(values, Range):
            yield values.draw(draw)
        else:
            yield from draw.sample(values, len(values))
