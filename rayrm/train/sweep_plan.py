"""Which trials a grid or a random search has: pure, seeded, before anything starts.

A trial is the words (`learning_rate=1e-5`) that make its run of the sweep's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from rayrm.errors import ConfigError
from rayrm.sweep_settings import Range, Space, SweepConfig
from rayrm.train.leg import MAY_CHANGE

Words = tuple[str, ...]


def check_space(space: Space, sweep: SweepConfig) -> None:
    """Raise ConfigError where the search has nothing to search, or does not know for how long."""
    if not space:
        raise ConfigError(
            "a sweep needs a parameter. Type for example `--param learning_rate=1e-5,3e-5`, or in the run "
            "file [sweep.space] and below it `learning_rate = [1e-5, 3e-5]`."
        )
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
        return [
            tuple(f"{key}={_drawn(values, draw)}" for key, values in space.items())
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
    """Words that try every listed value and both ends of every range once: each must make a run."""
    kept: Mapping[str, tuple[str, ...]] = {
        key: values.ends() if isinstance(values, Range) else values for key, values in space.items()
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


def _drawn(values: tuple[str, ...] | Range, draw: random.Random) -> str:
    return values.draw(draw) if isinstance(values, Range) else draw.choice(values)
