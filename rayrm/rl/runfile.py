"""RL run files: TOML and `key=value` words -> `RLRun`, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrm.config import ClusterConfig
from rayrm.errors import MissingExtraError
from rayrm.rl.guard import GuardSettings
from rayrm.rl.settings import Algorithm, PolicyConfig, PromptsConfig, RewardSource, RLRun
from rayrm.rl.shaping import Shaping
from rayrm.runfile import dump_tables, read_tables
from rayrm.serve_settings import ServeConfig
from rayrm.settings import settings

SECTIONS: dict[str, type] = {
    "policy": PolicyConfig,
    "prompts": PromptsConfig,
    "reward": RewardSource,
    "shaping": Shaping,
    "guard": GuardSettings,
    "cluster": ClusterConfig,
    "serve": ServeConfig,
}
"""Sections of an RL run file beside `[rl]`, the trainer's."""
TRAINER = "rl"
_PATHS = ("deepspeed", "fsdp_config")


def read_rl_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RLRun:
    """Read an RL run file and put `overrides` over it; a bare key is one of `[rl]`.

    Raises:
        ConfigError: the file is missing or no TOML, a section, key or value is wrong, or `output_dir` is
            missing.
        MissingExtraError: TRL, whose fields the trainer's table has, is not installed.
    """
    sections = {**SECTIONS, TRAINER: _table_of(_algorithm(path, overrides))}
    found = read_tables(path, overrides, sections, bare=TRAINER, needs={TRAINER: ("output_dir",)})
    table = dataclasses.asdict(found.pop(TRAINER))
    algorithm = table.pop("algorithm")
    trainer = {name: value for name, value in table.items() if value is not None}
    return RLRun(algorithm=algorithm, trainer=trainer, **found)


def dump_rl_run(run: RLRun) -> str:
    """The run as TOML, which `read_rl_run` reads back."""
    table = _table_of(run.algorithm)(algorithm=run.algorithm, **run.trainer)
    return dump_tables({**{name: getattr(run, name) for name in SECTIONS}, TRAINER: table})


def with_absolute_places(run: RLRun) -> RLRun:
    """The run with every local path absolute: workers have current directories of their own."""
    from rayrm.train.launch import absolute_source  # loads ray, which a run file is read without

    given = {name: run.trainer.get(name) for name in _PATHS}
    paths = {name: absolute_source(path) for name, path in given.items() if isinstance(path, str)}
    output_dir = str(run.output_dir.expanduser().absolute())
    return dataclasses.replace(
        run,
        policy=dataclasses.replace(run.policy, name=absolute_source(run.policy.name)),
        prompts=dataclasses.replace(
            run.prompts,
            train=absolute_source(run.prompts.train),
            heldout=absolute_source(run.prompts.heldout),
        ),
        reward=dataclasses.replace(run.reward, model=absolute_source(run.reward.model)),
        trainer={**run.trainer, **paths, "output_dir": output_dir},
    )


def _algorithm(path: str | Path | None, overrides: Sequence[str]) -> Algorithm:
    """Which trainer's fields `[rl]` has; GRPO's where nothing, or nothing sensible, is said."""
    said: Any = None
    if path is not None:
        with contextlib.suppress(OSError, ValueError):  # `read_tables` says what is wrong
            said = tomllib.loads(Path(path).read_text(encoding="utf-8")).get(TRAINER)
    said = said.get("algorithm") if isinstance(said, dict) else None
    for word in overrides:
        key, _, value = word.partition("=")
        if key.removeprefix(f"{TRAINER}.") == "algorithm":
            said = value
    return "rloo" if said == "rloo" else "grpo"


@functools.cache
def _table_of(algorithm: Algorithm) -> type[Any]:
    """Settings with `algorithm` and the names of TRL's config; what is None is left to TRL."""
    try:
        from trl import GRPOConfig, RLOOConfig
    except ImportError as error:
        raise MissingExtraError(
            "GRPO and RLOO need TRL, which is not installed. Type: pip install 'rayrm[trl]'"
        ) from error
    kind = {"grpo": GRPOConfig, "rloo": RLOOConfig}[algorithm]
    names = [one.name for one in dataclasses.fields(kind) if one.init]
    types = {"algorithm": Algorithm, **dict.fromkeys(names, Any)}
    defaults: dict[str, Any] = {"algorithm": "grpo", **dict.fromkeys(names)}
    return settings(type(kind.__name__, (), {"__annotations__": types, **defaults}))
