"""[RAY] The Ray that a run uses: a cluster that is there, or one of its own on this machine.

An own Ray serves one driver and ends with it, so what watches over clusters is left out: the dashboard's ten
parts, idle task workers, Ray Train's watchers for lost controllers and reclaimed nodes. Every process of
Ray's wakes a hundred times a second and takes about 1% of a core, and two threads that compute in step both
wait for the one that was interrupted. On 2 cores that left the training worker 177% of them; so it has 184%.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayrm.errors import ClusterError

_PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# What Ray Train starts for every run and a run on an own Ray has no use for: nothing outlives its controller
# there, and no rank asks for `ray.train.get_dataset_shard`.
_WATCHERS = ("PlacementGroupCleanerCallback", "DatasetsCallback")


def ensure_ray(address: str | None = None) -> None:
    """Connects to the cluster at `address` (or `RAY_ADDRESS`); without one, starts Ray on this machine.

    Does nothing where Ray is initialised already.
    """
    import ray
    from ray.exceptions import RaySystemError

    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True}
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
        return
    cpus = max(4, os.cpu_count() or 1)  # logical: Ray Data must not starve behind the training workers
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            _system_config={"num_workers_soft_limit": 0},  # a worker that has been idle for a second ends
            **quiet,
        )
    except Exception as error:
        # What Ray says of a start that took too long is of one of these classes.
        if type(error) is not Exception and not isinstance(error, RaySystemError):
            raise
        raise ClusterError(
            f"Ray did not start on this machine: {error} Other processes may keep it busy: type the same "
            "command again, or start Ray by itself (`ray start --head`) and set RAY_ADDRESS=auto."
        ) from error


def join_cluster(address: str | None) -> None:
    """Connect to the cluster at `address`, or `RAY_ADDRESS`; without one, start Ray on this machine."""
    try:
        ensure_ray(address)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster lets us in at {address or 'RAY_ADDRESS'}: {error}. Start one with `ray start "
            "--head`, or leave out the address (`cluster.address`, --address, RAY_ADDRESS) to run on this "
            "machine alone."
        ) from error


def scorer_resources(num_workers: int) -> dict[str, Any]:
    """What each of a pool of scoring actors asks for: a GPU where the cluster has any, else a CPU.

    Raises ClusterError where that is more than there is.
    """
    import ray

    cluster = ray.cluster_resources()
    kind = "GPU" if cluster.get("GPU") else "CPU"
    have = int(cluster.get(kind, 0))
    if num_workers > have:
        raise ClusterError(
            f"--num-workers ({num_workers}) is more than the {have} {kind}s of the cluster, and each worker "
            f"has one. Type --num-workers {have}."
        )
    return {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}


def trainer_class() -> type[Any]:
    """Ray Train's `TorchTrainer`; without its watchers where there is no dashboard, of which they ask."""
    from ray.train.torch import TorchTrainer

    stock: type[Any] = TorchTrainer
    if _has_dashboard():
        return stock

    class OwnRayTrainer(TorchTrainer):  # type: ignore[misc]
        def fit(self) -> Any:
            with _unwatched():
                return super().fit()

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in _WATCHERS]

    return OwnRayTrainer


@contextmanager
def keeping_handlers(*numbers: signal.Signals) -> Iterator[None]:
    """Signals do after the block what they did before: Ray and Ray Train leave handlers of theirs behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _unwatched() -> Iterator[None]:
    """Ray Train runs of this block do not look for reclaimed nodes where there is one node only."""
    import ray

    if len(ray.nodes()) > 1 or _PREEMPTION_WATCHER in os.environ:
        yield
        return
    os.environ[_PREEMPTION_WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[_PREEMPTION_WATCHER]


def _has_dashboard() -> bool:
    """Of the Ray that this process is connected to; clusters have one unless `ray start` is told not to."""
    from ray.experimental.internal_kv import _internal_kv_get

    # A task's process is told the default address by `ray.init`, whether anything listens there or not.
    return bool(_internal_kv_get("webui:url", namespace="dashboard"))
