"""[RAY] The reward service: a Serve application whose replicas compute a batch whenever the model is free.

Requests queue up while the model computes; then the next batch is planned (`scheduler.py`: under the token
budget, texts that begin alike together, across requests), computed in a thread beside the event loop, and
every request whose last text is done is answered, with the version that scored it. A cancelled request leaves
the queue before it is computed; a bad input fails its own request only. Everything wrong with the model's
files is raised by `deploy` before Serve starts. Scoring without a cluster is `RewardModel`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve

from rayrm.config import ServeConfig
from rayrm.data.tokenize import TextInput
from rayrm.errors import ClusterError, RewardUnavailableError, ScoreError
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import CURRENT, MANIFEST, PublishedModel, content_version, open_published
from rayrm.serve.request import Truncation
from rayrm.serve.scheduler import QueuedText
from rayrm.serve.scorer import RewardModel, check_finite

logger = logging.getLogger(__name__)

# A replica's queue is its own; Serve's limit (5 unless raised) would keep requests from meeting in a batch.
_MAX_ONGOING_REQUESTS = 4096


class RewardReplica:
    """One copy of the model and its queue; Serve calls `score` and `check_health`."""

    def __init__(self, path: str, version: str, max_tokens_per_batch: int | None) -> None:
        self._model = RewardModel.from_pretrained(path, max_tokens_per_batch=max_tokens_per_batch)
        # Broken weights end the start of the replica here, and not the first caller's request.
        self._model.score_ids([np.zeros(1, np.int32)])
        self._version = version
        self._queue = self._model.queue()
        self._answers: dict[int, asyncio.Future[list[float]]] = {}
        self._num_requests = 0
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        # One thread each: a tokenizer must not be entered twice, and the model computes one batch at a time.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._computing = ThreadPoolExecutor(1, "compute")

    async def score(
        self, inputs: Sequence[TextInput], truncation: Truncation | None = None
    ) -> tuple[list[float], str]:
        """The scores of `inputs`, in order, and the version that gave them. Raises ScoreError."""
        if not inputs:
            return [], self._version
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running.create_task(self._compute_batches())
        sequences = await running.run_in_executor(
            self._tokenizing, partial(self._model.encode, inputs, truncation=truncation)
        )
        request = self._num_requests
        self._num_requests += 1
        answer = self._answers[request] = running.create_future()
        self._queue.add(request, sequences)
        self._arrived.set()
        try:
            return await answer, self._version
        finally:
            # Answered, failed or cancelled: what of it still waits is not computed.
            self._queue.drop(request)
            del self._answers[request]

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._loop is not None and self._loop.done():
            raise RuntimeError("the replica's batch loop has ended") from (
                None if self._loop.cancelled() else self._loop.exception()
            )

    async def _compute_batches(self) -> None:
        while True:
            await self._arrived.wait()
            texts = self._queue.take()
            if not texts:
                self._arrived.clear()
                continue
            computed = asyncio.get_running_loop().run_in_executor(
                self._computing, self._model.compute, [text.ids for text in texts]
            )
            await asyncio.wait([computed])
            failure = computed.exception()
            if failure is None:
                self._give(texts, computed.result())
            else:
                self._fail(texts, failure)

    def _give(self, texts: Sequence[QueuedText], scores: Sequence[float]) -> None:
        for request, complete in self._queue.answer(texts, scores):
            answer = self._answers[request]
            if answer.done():
                continue
            try:
                check_finite(complete)
            except ScoreError as error:
                answer.set_exception(error)
            else:
                answer.set_result(complete)

    def _fail(self, texts: Sequence[QueuedText], failure: BaseException) -> None:
        for request in {text.request for text in texts}:
            self._queue.drop(request)
            answer = self._answers.get(request)
            if answer is not None and not answer.done():
                answer.set_exception(failure)


def deploy(
    model: PublishedModel | str | Path,
    name: str | None = None,
    *,
    config: ServeConfig | None = None,
    wait_s: float = 600.0,
    check_resources: bool = True,
    **fields: Any,
) -> RewardClient:
    """Serve `model` as the application `name` on the running cluster; returns when it answers.

    Args:
        model: a published model, its directory (or `registry/<name>`: the current version), or any saved
        model. name: the application's name (default: the config's, "reward"). A second call with the same
        name
            replaces the model; requests in flight are answered by the old one.
        config: a `ServeConfig`; or pass its fields as keywords (`num_replicas=2`).
        wait_s: how long to wait for the replicas to be ready.
        check_resources: refuse at once what is more than the cluster has. False on a cluster that grows.

    Raises:
        PublishError, ModelError: the files are missing, damaged or no reward model (nothing was started).
        ClusterError: more resources than the cluster has, or not ready within `wait_s`.
        RewardUnavailableError: the replicas could not start; the message holds Serve's.
    """
    settings = _settings(config, name, fields)
    path, version = _checked_model(model)
    if not ray.is_initialized():
        connect()
    if check_resources:
        _check_resources(settings)
    is_update = settings.name in serve.status().applications
    # The handle is the way in: no HTTP proxy is started for it.
    serve.start(proxy_location="Disabled")
    application = serve.deployment(
        RewardReplica,
        name="RewardReplica",
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=settings.max_queued_requests,
        health_check_period_s=1.0,
        # A log line for each request would be one for each step of every caller.
        logging_config={"enable_access_log": False},
        # The files were checked: a replica that cannot load them once will not the second time.
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.5,
    ).bind(str(path), version, settings.max_tokens_per_batch)
    target = serve.RunTarget(application, name=settings.name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        _wait_until_running(settings.name, wait_s)
    except (ClusterError, RewardUnavailableError):
        # What never ran is removed, so that callers are told at once and do not wait for their deadline.
        if not is_update:
            serve.delete(settings.name)
        raise
    return RewardClient(settings.name)


def serve_forever(
    model: PublishedModel | str | Path, config: ServeConfig | None = None, *, address: str | None = None
) -> None:
    """Deploy, say how to call it, wait for SIGINT or SIGTERM, and remove this application alone.

    Uses the Ray cluster at `address`, else the one that runs on this machine, else starts one for its own
    life.
    """
    settings = config or ServeConfig()
    _, version = _checked_model(model)
    started_here = connect(address)
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        deploy(model, config=settings)
        print(
            f"serving {version} as {settings.name!r} on the Ray cluster at "
            f"{ray.get_runtime_context().gcs_address}\n"
            f"call it from any process of the cluster:\n"
            f"    from rayrm import RewardClient\n"
            f"    RewardClient({settings.name!r})(prompts=[...], completions=[...])\n"
            "stop with Ctrl-C",
            flush=True,
        )
        while not stop.wait(timeout=0.5):
            pass
        serve.delete(settings.name)
        print(f"removed {settings.name!r}", flush=True)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        if started_here:
            ray.shutdown()


def connect(address: str | None = None, *, start: bool = True) -> bool:
    """Connect this process to Ray; True when that started a new cluster here, for the process's own life.

    The cluster is `address`, else RAY_ADDRESS, else one that runs on this machine, else a new one; not
    that with `start=False`: who calls a service must not start an empty cluster.
    """
    if ray.is_initialized():
        return False
    wanted = address or os.environ.get("RAY_ADDRESS")
    try:
        if wanted is not None:
            _check_reachable(wanted)
        ray.init(address=wanted or "auto", log_to_driver=False)
    except OSError as error:  # ConnectionError is one
        if wanted is not None:
            raise ClusterError(
                f"no Ray cluster lets us in at {wanted!r}: {error}. Start one with `ray start --head`, or "
                "leave the address (and RAY_ADDRESS) out to start one in this process."
            ) from error
        if not start:
            raise ClusterError(
                f"no Ray cluster runs here that lets us in: {error}. Start the service with `rayrm serve "
                "MODEL`, or give its cluster's address (`--address`, or RAY_ADDRESS)."
            ) from error
        ray.init(include_dashboard=False, log_to_driver=False)
        return True
    return wanted == "local"


def _check_reachable(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`: Ray itself would try for some eight minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _settings(config: ServeConfig | None, name: str | None, fields: dict[str, Any]) -> ServeConfig:
    if name is not None:
        fields = {"name": name, **fields}
    return ServeConfig(**fields) if config is None else dataclasses.replace(config, **fields)


def _checked_model(model: PublishedModel | str | Path) -> tuple[Path, str]:
    """The directory to load and its version; PublishError for anything that is not a sound reward model."""
    path = model.path if isinstance(model, PublishedModel) else Path(model)
    if (path / MANIFEST).is_file() or (path / CURRENT).is_file():
        published = open_published(path)
        return published.path.resolve(), published.version
    return path.resolve(), content_version(path)


def _check_resources(settings: ServeConfig) -> None:
    has = ray.cluster_resources()
    for kind, each, setting in (
        ("CPU", settings.num_cpus, "num_cpus"),
        ("GPU", settings.num_gpus, "num_gpus"),
    ):
        needed = settings.num_replicas * each
        if needed > has.get(kind, 0):
            raise ClusterError(
                f"{settings.num_replicas} replicas with `{setting}` ({each:g}) need {needed:g} {kind}s, the "
                "cluster "
                f"has {has.get(kind, 0):g}. Lower `num_replicas` or `{setting}`; on a cluster that grows on "
                "demand pass check_resources=False."
            )


def _wait_until_running(name: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        application = serve.status().applications.get(name)
        status = "NOT_STARTED" if application is None else application.status.value
        messages = [] if application is None else [application.message]
        messages += [] if application is None else [d.message for d in application.deployments.values()]
        said = " ".join(message for message in messages if message)
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RewardUnavailableError(f"application {name!r} could not start ({status}): {said}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"application {name!r} is not ready after {wait_s:g} s ({status}): {said or 'no message'}. "
                "Free the resources that its replicas wait for, lower `num_replicas`, or raise `wait_s`."
            )
        time.sleep(0.1)
