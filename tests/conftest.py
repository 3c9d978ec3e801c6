"""Fixtures shared by all tests: one local Ray cluster for the whole test session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from filelock import FileLock
from hypothesis import settings

# Before torch or ray is imported anywhere: two cores, many processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# What a shell starts in the background ignores SIGINT, and so would every process that tests signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a case takes says more of what else the machine does than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray cluster with 4 logical CPUs, shared by every test of this process that asks for it."""
    import ray

    if not ray.is_initialized():
        # Test processes side by side start theirs one after the other: none takes a port another has
        # just found free.
        with FileLock(tmp_path_factory.getbasetemp().parent / "ray-starts.lock"):
            # Not the cluster of another program on this machine.
            ray.init(
                address="local",
                num_cpus=4,
                object_store_memory=300 * 2**20,
                # With one Ray Train starts three more processes for each run. `test_jobs` has one.
                include_dashboard=False,
                log_to_driver=True,
            )
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def ray_before_all(request: pytest.FixtureRequest) -> None:
    """Start the cluster before the first test where any needs it, in whatever order they run.

    Ray forks this process, which a system may refuse once minutes of tests have mapped tens of GB.
    """
    if any("ray_cluster" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("ray_cluster")
