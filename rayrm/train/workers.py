"""[RAY] Start a training job's ranks: in this process, or as Ray Train workers.

Both go through `TorchTrainer`; its local mode runs the same function here, so that a model is updated in
place. What a worker raised comes back as the error it was.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrm.errors import ClusterError, ConfigError, RayrmError
from rayrm.logs import show_logs
from rayrm.own_ray import ensure_ray, trainer_class
from rayrm.train.checkpoint import checkpoints
from rayrm.train.job import TrainJob
from rayrm.train.last_error import forget_error, leave_error, left_error
from rayrm.train.preemption import leaving_on_sigterm
from rayrm.train.worker import train_rank

logger = logging.getLogger("rayrm.train")


def check_run_config(run_config: Any, num_workers: int) -> None:
    """Raise ConfigError for what a `ray.train.RunConfig` asks for and a run of ours decides otherwise."""
    if run_config is None:
        return
    from ray.train import RunConfig

    if not isinstance(run_config, RunConfig):
        raise ConfigError(f"`run_config` is a {type(run_config).__name__}. Pass `ray.train.RunConfig(...)`.")
    if num_workers == 0:
        raise ConfigError(
            "`run_config` needs `scaling_config`: training in this process has no workers. Pass both, or "
            "neither."
        )
    usual = RunConfig()
    ours = {
        "name": "the run's directory is `output_dir`",
        "storage_path": "the run's directory is `output_dir`; an object store for its copy is "
        "`RewardConfig.storage_path`",
        "storage_filesystem": "`RewardConfig.storage_path` names an object store",
        "checkpoint_config": "`save_total_limit` says how many checkpoints are kept, "
        "`load_best_model_at_end` that the best is",
    }
    for key, why in ours.items():
        given = getattr(run_config, key)
        # Ray makes a name of the time where none is given.
        if given != getattr(usual, key) and not (key == "name" and given.startswith("ray_train_run-")):
            raise ConfigError(f"`run_config.{key}` ({given!r}) is not used: {why}. Leave it out.")


def check_pickles(given: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the argument that cannot be sent to workers, and why."""
    from ray import cloudpickle

    for name, value in given.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # whatever pickling it raises
            said = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"`{name}` ({type(value).__name__}) cannot be sent to workers: {type(error).__name__}: "
                f"{said}. Let it make what it needs on first use, or train in this process "
                "(`scaling_config=None`)."
            ) from error


def fit_here(job: TrainJob) -> None:
    """Train in this process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    trainer = TorchTrainer(
        _run_rank, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)
    )
    with leaving_on_sigterm(job.output_dir):
        trainer.fit()


def fit_on_workers(job: TrainJob, scaling_config: Any, run_config: Any = None) -> None:
    """Train on the workers of `scaling_config`, by what `check_run_config` leaves of `run_config`."""
    from ray.train import LoggingConfig, RunConfig, TrainingFailedError

    given = RunConfig() if run_config is None else run_config
    # Ray Train would print every report; the records are shown by `Display`.
    quiet = LoggingConfig(log_level="WARNING")
    trainer = trainer_class()(
        _run_rank,
        train_loop_config={"job": job, "may_restart": True},
        scaling_config=scaling_config,
        run_config=RunConfig(
            name=job.output_dir.name,
            storage_path=str(job.output_dir.parent),
            failure_config=given.failure_config,
            callbacks=[*(given.callbacks or []), _told_losses(job.output_dir, given)],
            worker_runtime_env=given.worker_runtime_env,
            logging_config=quiet if given.logging_config == LoggingConfig() else given.logging_config,
        ),
    )
    forget_error(job.output_dir)
    try:
        # Not before: whatever asks for Ray until here sets Ray's own handler.
        with leaving_on_sigterm(job.output_dir):
            trainer.fit()
            error = left_error(job.output_dir)
            if error is not None:
                raise error
    except TrainingFailedError as failure:
        found = cause_in_workers(failure)
        if found is failure:
            raise
        raise found from failure
    finally:
        forget_error(job.output_dir)


def _told_losses(output_dir: Path, run_config: Any) -> Any:
    """What says, in one line among Ray's stack traces, that workers were lost and what follows."""
    from ray.train import UserCallback

    most = run_config.failure_config.max_failures if run_config.failure_config else 0

    class TellLosses(UserCallback):  # type: ignore[misc]
        num_losses = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.num_losses += 1
            if left_error(output_dir) is not None or 0 <= most < self.num_losses:
                return  # the run ends, and the driver says why
            show_logs()
            of_most = "" if most < 0 else f" of {most} that `max_failures` allows"
            found = checkpoints(output_dir)
            logger.warning(
                "lost worker %s (loss %d%s): the run goes on from %s",
                ", ".join(map(str, sorted(worker_exceptions))),
                self.num_losses,
                of_most,
                found[-1].name if found else "its beginning",
            )

    return TellLosses()


def _run_rank(config: dict[str, Any]) -> None:
    """What every Ray Train worker (or this process, in local mode) runs."""
    import ray.train

    # Every rank decides the same; one of them says so.
    first = ray.train.get_context().get_world_rank() == 0
    show_logs(logging.INFO if first else logging.WARNING)
    # torch.distributed warns of its own renaming at every collective.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Ray Train prints every report, under a logger named after its file, which `logging_config` misses.
    reporting = sys.modules.get("ray.train.v2._internal.execution.context")
    if reporting is not None:
        logging.getLogger(reporting.__file__).setLevel(logging.WARNING)

    def report(record: dict[str, float]) -> None:
        # Only now and then: a report waits for the controller's next poll, about 2 s.
        ray.train.report(dict(record))

    job: TrainJob = config["job"]
    may_restart = config.get("may_restart")
    if may_restart and left_error(job.output_dir) is not None:
        return
    try:
        train_rank(job, report)
    except RayrmError as error:
        if may_restart:
            leave_error(job.output_dir, error)
        # By a name of Ray Train's own, which shows the stack trace of whatever a rank raises.
        logging.getLogger("ray.train.v2._internal.util").addFilter(_is_no_mistake)
        raise


def _is_no_mistake(record: logging.LogRecord) -> bool:
    """Whether a record is about no error that a user can mend, which the driver tells in one line."""
    error = sys.exc_info()[1]
    return not (isinstance(error, RayrmError) and isinstance(error, ValueError))


def cause_in_workers(failure: Exception) -> Exception:
    """The error that a worker raised, where it is one of ours; else Ray's, with notes of what ranks raised.

    Ray's own text of them is cut in the middle, where an error of a callback or of `compute_metrics` stands.
    """
    causes = {
        rank: getattr(cause, "cause", None) or cause
        for rank, cause in getattr(failure, "worker_failures", {}).items()
    }
    for inner in causes.values():
        for error in (inner, getattr(inner, "__cause__", None)):
            if isinstance(error, RayrmError):
                return error
    for rank, inner in sorted(causes.items()):
        failure.add_note(textwrap.shorten(f"worker {rank}: {type(inner).__name__}: {inner}", 500))
    return failure


def check_cluster(scaling_config: Any) -> None:
    """Raise ClusterError where the cluster has less than the workers ask for."""
    import ray

    ensure_ray()
    each = dict(scaling_config.resources_per_worker or {})
    if not each:
        each = {"GPU": 1.0} if scaling_config.use_gpu else {"CPU": 1.0}
    have = ray.cluster_resources()
    workers = int(scaling_config.num_workers)
    for name, amount in each.items():
        if amount * workers > have.get(name, 0.0):
            raise ClusterError(
                f"{workers} workers of {amount:g} {name} need {amount * workers:g} {name}, but the cluster "
                f"has {have.get(name, 0.0):g}. Lower `cluster.num_workers` or "
                "`cluster.resources_per_worker`, or join a larger cluster (`cluster.address`)."
            )
