"""Whether an RL run may use a directory: begin in it, go on in it, or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrm.errors import RunDirectoryError, writing
from rayrm.rl.runfile import dump_rl_run, read_rl_run
from rayrm.rl.settings import RLRun
from rayrm.train.holding import holding
from rayrm.train.records import METRICS

FINISHED = "finished.json"
_RUN = "run.toml"
_OF_REWARD = ("model", "use", "weights", "gold", "truncation")
_MODEL = "reward.model"


@contextmanager
def own_directory(run: RLRun) -> Iterator[None]:
    """Within the block the run's directory is this process's alone; see `begin`. Raises RunDirectoryError."""
    output_dir = run.output_dir

    def refuse(holder: str) -> None:
        raise RunDirectoryError(
            f"another process trains in {output_dir} ({holder}). Wait for it, or choose another `output_dir`."
        )

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"`output_dir` {output_dir} cannot be made ({error.strerror or error}). Choose another."
        ) from error
    with holding(output_dir / ".lock", refuse):
        begin(run)
        yield


def begin(run: RLRun) -> None:
    """Make the run's directory, or check that it holds this run, unfinished; then write its `run.toml`.

    What says where and by what a run is computed (`[cluster]`, `[serve]`, whether a service runs already) may
    change between attempts, and anything may before the policy is first asked. Raises RunDirectoryError.
    """
    output_dir = run.output_dir
    if (output_dir / FINISHED).exists():
        raise RunDirectoryError(
            f"{output_dir} holds a finished run. Choose another `output_dir`, or delete that directory."
        )
    file = output_dir / _RUN
    if _has_begun(output_dir) and file.exists():
        then, now = _what_it_learns(read_rl_run(file)), _what_it_learns(run)
        if None in (then[_MODEL], now[_MODEL]):
            now[_MODEL] = then[_MODEL]  # of a service that runs already the model is the service's matter
        unlike = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
        if unlike:
            raise RunDirectoryError(
                f"{output_dir} holds another run. They differ in {', '.join(unlike)}. Choose another "
                "`output_dir`, or set that back to go on with the run that is there."
            )
    elif not file.exists() and ((output_dir / "config.json").exists() or (output_dir / METRICS).exists()):
        raise RunDirectoryError(f"{output_dir} holds something else. Choose another `output_dir`.")
    with writing(file):
        output_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_rl_run(run), encoding="utf-8")


def _has_begun(output_dir: Path) -> bool:
    return (output_dir / METRICS).exists() or any(output_dir.glob("checkpoint-*"))


def _what_it_learns(run: RLRun) -> dict[str, Any]:
    """By key, what decides the run's result."""
    reward = {name: getattr(run.reward, name) for name in _OF_REWARD}
    tables = {
        "policy": dataclasses.asdict(run.policy),
        "prompts": dataclasses.asdict(run.prompts),
        "reward": reward,
        "shaping": dataclasses.asdict(run.shaping),
        "rl": {"algorithm": run.algorithm, **run.trainer},
    }
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}
