"""Where a run's records are shown beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio.

Rank 0 tells each tool of `report_to` what `metrics.jsonl` is told, under the names of transformers' callbacks
(`train/loss`, `eval/accuracy`) and with the optimizer's step. A run that goes on does so in the same run of
each tool, whose name `trackers.json` keeps; steps that are done again are not told again. Projects, servers
and keys are set as each tool's own documentation says, in the environment of whoever starts the run.

A tool that does not start ends a run at its beginning. Later no tool is worth a run: one that fails is left
out with a warning. What a tool held in its buffers when its process was killed, `metrics.jsonl` alone holds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, MissingExtraError

logger = logging.getLogger("rayrm.train")
TRACKERS = "trackers.json"
Values = Mapping[str, float]
_OWN: Final = {"wandb": "WANDB_", "mlflow": "MLFLOW_", "trackio": "TRACKIO_"}
# MLflow's limit for one call.
_MLFLOW_BATCH: Final = 100
_MLFLOW_LONGEST: Final = 500


class Tracker(Protocol):
    """One tool. `run_id`: by what it finds the run again; None where it looks into `output_dir`."""

    run_id: str | None

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise MissingExtraError for a tool that is not installed here."""
    for name in report_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a mere directory of that name
            raise MissingExtraError(
                f"`report_to` ({name!r}) needs the package {name}, which is not installed. "
                f"Type: pip install {name}"
            )


def tracker_environment(report_to: Sequence[str]) -> dict[str, str]:
    """What this process's environment says of the tools, for the worker that calls them."""
    prefixes = tuple(prefix for name, prefix in _OWN.items() if name in report_to)
    # The address of a process of wandb's that serves this machine alone.
    own = {"WANDB_SERVICE"}
    return {key: value for key, value in os.environ.items() if key.startswith(prefixes) and key not in own}


class Trackers:
    """The tools that `report_to` names, told together."""

    def __init__(self, config: RewardConfig, output_dir: Path) -> None:
        self._config, self._dir = config, output_dir
        self._open: dict[str, Tracker] = {}
        self._told: tuple[int, set[str]] = (-1, set())

    def begin(self, step: int, before: Sequence[Mapping[str, Any]]) -> None:
        """Start, or go on after `step`; `before`: the records that the tools have been told.

        Raises:
            MissingExtraError: a tool that this worker lacks. ConfigError: one that does not start.
        """
        if not self._config.report_to:
            return
        file = self._dir / TRACKERS
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"told": [-1, []]}
        last = max([int(record["step"]) for record in before], default=-1)
        told = {key for record in before if record["step"] == last for key in record}
        earlier, also = known["told"]
        told |= set(also) if earlier == last else set()
        self._told = (last, told) if last >= earlier else (earlier, set(also))
        for name in self._config.report_to:
            check_trackers([name])
            try:
                self._open[name] = _BY_NAME[name](self._config, self._dir, known.get(name), step)
            except Exception as error:
                said = f"`report_to` ({name!r}) did not start: {type(error).__name__}: {error}"
                if step == 0:
                    raise ConfigError(f"{said}. Mend that, or leave {name} out.") from error
                logger.warning("%s; this run goes on without it", said)
        ids = {name: one.run_id for name, one in self._open.items() if one.run_id}
        kept = {**known, **ids, "told": [self._told[0], sorted(self._told[1])]}
        aside = file.with_name(f".{TRACKERS}.{os.getpid()}")
        aside.write_text(json.dumps(kept))
        aside.replace(file)

    def write(self, record: Mapping[str, float]) -> None:
        """Tell every tool; TensorBoard drops by itself what is told again."""
        step = int(record["step"])
        values = {tool_name(key): value for key, value in record.items() if key != "step"}
        last, told = self._told
        again = step < last or (step == last and set(record) <= told)
        for name, tracker in list(self._open.items()):
            if again and name != "tensorboard":
                continue
            try:
                tracker.write(step, values)
            except Exception as error:
                del self._open[name]
                logger.warning(
                    "%s takes no more records (%s: %s): metrics.jsonl holds them all",
                    name,
                    type(error).__name__,
                    error,
                )

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Show in TensorBoard how arrays are spread, by the name of each."""
        board = self._open.get("tensorboard")
        if isinstance(board, _TensorBoard):
            board.histograms(step, values)

    def close(self) -> None:
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s did not end its run: %s: %s", name, type(error).__name__, error)
        self._open = {}


def tool_name(key: str) -> str:
    """`eval_loss` -> `eval/loss`, `loss` -> `train/loss`: as transformers' `rewrite_logs` (5.23)."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _settings(output_dir: Path) -> dict[str, Any]:
    """The run's settings as `run.toml` has them: `reward.learning_rate` -> its value, and no credentials."""
    file = output_dir / "run.toml"
    flat: dict[str, Any] = {}

    def add(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    add("", tomllib.loads(file.read_text()) if file.exists() else {})
    return flat


class _TensorBoard:
    run_id = None

    def __init__(self, config: RewardConfig, output_dir: Path, run_id: str | None, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = output_dir / "tensorboard" / (config.run_name or "")
        self._board: Any = SummaryWriter(str(place), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if name != "train/epoch":
                self._board.add_scalar(name, value, step)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        for name, array in values.items():
            self._board.add_histogram(name, array, step)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """https://docs.wandb.ai/ref/python/init (0.31); a run that the script began is used, and left open."""

    def __init__(self, config: RewardConfig, output_dir: Path, run_id: str | None, step: int) -> None:
        import wandb

        self._is_own = wandb.run is None
        self._run: Any = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", config.project),
            name=config.run_name or output_dir.name,
            id=run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            resume="allow",
            dir=str(output_dir),
            config=_settings(output_dir),
            # Ray keeps the output of workers.
            settings=wandb.Settings(console="off"),
        )
        self.run_id: str | None = str(self._run.id)
        # As transformers does, since what callbacks log by `wandb.log` counts wandb's own steps up, too.
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def write(self, step: int, values: Values) -> None:
        # A run that goes on offline would count from 0 again, and `wandb sync` lay its rows over the first.
        place = {"step": step} if self._run.offline else {}
        self._run.log({**values, "train/global_step": step}, **place)

    def close(self) -> None:
        if self._is_own:
            self._run.finish()


class _Mlflow:
    """MLflow (3.17) by its client, which needs no active run; without a server, `mlflow.db` in the run."""

    def __init__(self, config: RewardConfig, output_dir: Path, run_id: str | None, step: int) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        is_set = os.environ.get("MLFLOW_TRACKING_URI") or mlflow.is_tracking_uri_set()
        own = output_dir / "mlflow.db"
        uri = mlflow.get_tracking_uri() if is_set else f"sqlite:///{own}"
        if not is_set and not own.exists():
            run_id = None  # it went with a lost disk: what follows is another run's
        self._client: Any = mlflow.MlflowClient(uri)
        self._metric = Metric
        active = mlflow.active_run()
        given = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID")
        self._is_own = active is None
        if run_id or given:
            self.run_id: str | None = run_id or given
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(place, run_name=config.run_name or output_dir.name)
        self.run_id = str(run.info.run_id)
        # Parameters cannot change later, so a run that goes on keeps those of its start.
        told = [Param(key, str(value)[:_MLFLOW_LONGEST]) for key, value in _settings(output_dir).items()]
        for begin in range(0, len(told), _MLFLOW_BATCH):
            self._client.log_batch(self.run_id, params=told[begin : begin + _MLFLOW_BATCH])

    def write(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        # `eval/loss` and the like; what a set's name may have beside is no name of MLflow's.
        metrics = [self._metric(_plain(name), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        if self._is_own:
            self._client.set_terminated(self.run_id)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-./ :" else "_" for letter in name)


class _Trackio:
    """https://huggingface.co/docs/trackio (0.43), which finds a run again by its name alone, the latest of
    that name: so each has one of its own. TRACKIO_DIR keeps it."""

    def __init__(self, config: RewardConfig, output_dir: Path, run_id: str | None, step: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            name = f"{config.run_name or output_dir.name}-{secrets.token_hex(4)}"
            self._run: Any = trackio.init(
                config.project,
                run_id or name,
                config=_settings(output_dir),
                resume="allow" if run_id else "never",
                embed=False,
            )
        self.run_id: str | None = str(self._run.name)

    def write(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            trackio.finish()


_BY_NAME: Final[dict[str, Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
