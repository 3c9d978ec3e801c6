"""[RAY] How a process calls a service: one event loop in a thread, in which calls that arrive together travel
together, and each is tried again until its deadline.

Callers in any thread or event loop of the process meet here, so that per-sample callers (16 threads that each
want one score) become few requests of many texts. A call that Serve lost with a replica, or that found a full
queue, is sent again: scoring twice gives the same score.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import ray
from pydantic import Field
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from rayrm.errors import (
    ClusterError,
    OverloadedError,
    RayrmError,
    RewardUnavailableError,
    VersionError,
)
from rayrm.serve.connect import connect
from rayrm.serve.request import ScoreRequest, ScoreResult
from rayrm.settings import frozen_settings

logger = logging.getLogger(__name__)

REPLICAS = "RewardReplica"


class _CancelledError(Exception):
    """Serve cancelled a request that its callers still wait for: its replica leaves."""


_LOST = (RayActorError, WorkerCrashedError, BackPressureError, _CancelledError)
_LATE = (GetTimeoutError, TimeoutError)
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_PATIENCE_FOR_VERSION_S = 3.0
"""While a service rolls, replicas differ: so long another one is asked for the version that is pinned."""
_TOGETHER_S = 0.002
"""A call waits so long for others. A request costs the service some ten milliseconds, whatever it holds."""
_LOOK_S = 2.0
"""How often it is looked whether the application of calls that wait is still there."""
_ALONE = 32
"""Texts: a call with so many waits for no other."""
_MOST_TEXTS = 256
"""Of calls that travel together: they are answered together too."""


@frozen_settings
class CallSettings:
    """How calls are made. `hedge_after_s`: a second attempt beside the first, after so long; None: none.

    `retry_overload`: a full queue is tried again until the deadline, else it is an error at once.
    """

    name: Annotated[str, Field(min_length=1)]
    deadline_s: Annotated[float, Field(gt=0)] = 120.0
    hedge_after_s: Annotated[float, Field(gt=0)] | None = None
    retry_overload: bool = True
    coalesce: bool = True
    prefer_local: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    request: ScoreRequest
    ends_at: float
    answer: asyncio.Future[ScoreResult]


@dataclass(eq=False)
class Caller:
    """The calls of this process to one service; all but `start_call` runs in the background loop."""

    settings: CallSettings
    _handle: Any = None
    _worker: str = ""
    _gathered: list[_Call] = field(default_factory=list)
    _sending: set[asyncio.Task[None]] = field(default_factory=set)
    _sent_calls: set[_Call] = field(default_factory=set)
    _watching: asyncio.Task[None] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def call(self, request: ScoreRequest) -> ScoreResult:
        """The answer, before the deadline. Raises what the replica refused, or RewardUnavailableError."""
        began = time.monotonic()
        attempts = _Attempts(self.settings.name, began, self.settings.deadline_s)
        while True:
            try:
                result = await self._attempt(request, attempts)
            except RayTaskError as error:
                raise _own_error(self.settings.name, error) from error
            except OverloadedError as error:
                if not self.settings.retry_overload:
                    raise
                await asyncio.sleep(await attempts.pause_after(error))
            except VersionError as error:
                if time.monotonic() - began > _PATIENCE_FOR_VERSION_S:
                    raise
                await asyncio.sleep(await attempts.pause_after(error))
            except (*_LOST, *_LATE) as error:
                # The handle's router leaves out a replica that died; a new one would have to learn of all.
                if isinstance(error, _LATE):
                    self._handle = None
                await asyncio.sleep(await attempts.pause_after(error))
            else:
                timing = replace(result.timing, total_s=time.monotonic() - began)
                return replace(result, timing=timing, retries=attempts.retries)

    async def handle(self) -> Any:
        """The service's handle, fetched once in each process."""
        async with self._lock:
            # A process that left its cluster and joined another has another id there.
            joined = ray.get_runtime_context().get_worker_id() if ray.is_initialized() else ""
            if self._handle is None or joined != self._worker:
                # Asks the controller, and blocks for milliseconds.
                self._handle = await asyncio.to_thread(self._connected)
                self._worker = ray.get_runtime_context().get_worker_id()
        return self._handle

    async def _attempt(self, request: ScoreRequest, attempts: _Attempts) -> ScoreResult:
        first = asyncio.ensure_future(self._sent(request, attempts.ends_at))
        if self.settings.hedge_after_s is None:
            return await first
        running = {first}
        try:
            done, _ = await asyncio.wait(running, timeout=self.settings.hedge_after_s)
            if done:
                return first.result()
            running = {first, asyncio.ensure_future(self._sent(request, attempts.ends_at))}
            while True:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not running:
                    return (good or list(done))[0].result()
        finally:
            for task in running:
                task.cancel()

    async def _sent(self, request: ScoreRequest, ends_at: float) -> ScoreResult:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        call = _Call(request, ends_at, asyncio.get_running_loop().create_future())
        if not self.settings.coalesce or len(request.inputs) >= _ALONE:
            self._send([call])
        else:
            self._gathered.append(call)
            if len(self._gathered) == 1:
                asyncio.get_running_loop().call_later(_TOGETHER_S, self._send_gathered)
            elif sum(len(one.request.inputs) for one in self._gathered) >= _MOST_TEXTS:
                self._send_gathered()
        return await asyncio.wait_for(call.answer, left_s)

    def _send_gathered(self) -> None:
        calls, self._gathered = self._gathered, []
        if calls:
            self._send(calls)

    def _send(self, calls: list[_Call]) -> None:
        task = asyncio.get_running_loop().create_task(self._exchange(calls))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _exchange(self, calls: list[_Call]) -> None:
        """Send calls as one request, and give each its answer; cancelled when no caller is left."""
        self._sent_calls.update(calls)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            await self._exchanged(calls)
        finally:
            self._sent_calls.difference_update(calls)

    async def _watch(self) -> None:
        """Tell those that wait when the application is removed: Serve would let them wait for good."""
        while self._sent_calls:
            await asyncio.sleep(_LOOK_S)
            if not self._sent_calls or (error := await asyncio.to_thread(self._gone)) is None:
                continue
            for call in list(self._sent_calls):
                if not call.answer.done():
                    call.answer.set_exception(error)

    def _gone(self) -> RewardUnavailableError | None:
        """Why nobody can answer any more; None: somebody may."""
        if not ray.is_initialized():
            return RewardUnavailableError(
                f"RewardClient({self.settings.name!r}): this process left its Ray cluster while it waited."
            )
        running = _running()
        return None if running is None or self.settings.name in running else self._removed(None)

    async def _exchanged(self, calls: list[_Call]) -> None:
        try:
            handle = await self.handle()
            now = time.monotonic()
            requests = [replace(call.request, left_s=max(call.ends_at - now, 0.0)) for call in calls]
            response = handle.score.remote(requests)
            answers = await _while_wanted(response, calls)
            if answers is None:
                response.cancel()
                return
        except Exception as error:
            told = await asyncio.to_thread(self._told, error)
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(told)
            return
        for call, answer in zip(calls, answers, strict=True):
            if call.answer.done():
                continue
            if isinstance(answer, ScoreResult):
                call.answer.set_result(answer)
            else:
                call.answer.set_exception(answer)

    def _told(self, error: Exception) -> Exception:
        if isinstance(error, RayServeException | DeploymentUnavailableError) and not isinstance(
            error, BackPressureError
        ):
            return self._removed(error)
        return error

    def _connected(self) -> Any:
        name = self.settings.name
        try:
            connect(start=False)
        except ClusterError as error:
            raise RewardUnavailableError(f"RewardClient({name!r}): {error}") from error
        try:
            serve.get_app_handle(name)  # of an application that is not there a deployment's would wait
        except RayServeException as error:
            raise self._removed(error) from error
        if self.settings.prefer_local:
            # One of its own: Serve gives all callers of a process the same, as the first one set it up.
            handle = DeploymentHandle(REPLICAS, name)
            handle._init(_prefer_local_routing=True)
            return handle
        while True:
            try:
                return serve.get_deployment_handle(REPLICAS, name)
            except KeyError as error:
                # An application that has just been deployed has its parts a moment later.
                if (_running() or {}).get(name) in (None, "RUNNING"):
                    raise self._removed(error) from error
                time.sleep(_FIRST_PAUSE_S)

    def _removed(self, error: Exception | None) -> RewardUnavailableError:
        name, running = self.settings.name, sorted(_running() or ())
        return RewardUnavailableError(
            f"no application {name!r} runs on this cluster (running: {', '.join(running) or 'none'}). "
            f"Start it with `rayrm serve MODEL --name {name}`, or pass the name of one that runs."
            + (f" Serve said: {error}" if name in running and error is not None else "")
        )


def _running() -> dict[str, str] | None:
    """The status of each application; None where Serve does not tell. Joins no cluster, as Serve would."""
    if not ray.is_initialized():
        return None
    try:
        applications = serve.status().applications
    except Exception as error:  # its controller is busy, or comes back
        logger.info("Serve does not tell its status: %s", error)
        return None
    return {name: str(one.status.value) for name, one in applications.items()}


async def _while_wanted(response: Any, calls: Sequence[_Call]) -> list[Any] | None:
    """The response; None as soon as no call waits for it any more."""
    nobody = asyncio.Event()

    def leave(_: Any) -> None:
        if all(call.answer.done() for call in calls):
            nobody.set()

    for call in calls:
        call.answer.add_done_callback(leave)
    answered = asyncio.ensure_future(_result_of(response))
    gone = asyncio.ensure_future(nobody.wait())
    try:
        await asyncio.wait([answered, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not answered.done():
        answered.cancel()
        answered.add_done_callback(_forget)
        return None
    if answered.cancelled():
        raise _CancelledError
    answers: list[Any] = answered.result()
    return answers


def _forget(answered: asyncio.Future[Any]) -> None:
    """Serve ends a cancelled request with an error of its own; asyncio reports one that nobody asks for."""
    if not answered.cancelled():
        answered.exception()


async def _result_of(response: Any) -> Any:
    return await response


class _Attempts:
    """The deadline of one call, and how long to pause before the next attempt."""

    def __init__(self, name: str, began: float, deadline_s: float) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self.ends_at = began + deadline_s
        self._pause_s = _FIRST_PAUSE_S
        self.retries = 0

    async def pause_after(self, error: Exception) -> float:
        """Seconds to wait before trying again; RewardUnavailableError when the deadline comes first."""
        pause_s = self._pause_s
        if isinstance(error, OverloadedError):
            pause_s = min(max(pause_s, error.retry_after_s), _LONGEST_PAUSE_S)
        if self.ends_at - time.monotonic() <= pause_s:
            try:
                found = await asyncio.wait_for(asyncio.to_thread(_running), _FIRST_PAUSE_S * 20)
            except TimeoutError:
                found = None
            status = "unknown" if found is None else found.get(self._name, "absent")
            raise RewardUnavailableError(
                f"the reward service {self._name!r} gave no answer within {self._deadline_s:g} s "
                f"(application: {status}; last: {type(error).__name__}). Raise `deadline_s`, add replicas, "
                "or look at `serve status`."
            ) from error
        logger.info("reward service %s: %s; again in %.2f s", self._name, type(error).__name__, pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self.retries += 1
        return pause_s


def _own_error(name: str, error: RayTaskError) -> RayrmError:
    """What the replica raised, as the exception it was there."""
    cause = error.cause
    if isinstance(cause, RayrmError):
        return cause
    return RewardUnavailableError(
        f"the reward service {name!r} failed: {type(cause).__name__}: {cause}. Its replica's log has the "
        "trace."
    )


class _Background:
    """The event loop of a process's callers, in a thread; another process (a fork) starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._callers: dict[CallSettings, Caller] = {}

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._pid, self._loop, self._callers = os.getpid(), asyncio.new_event_loop(), {}
                threading.Thread(target=self._loop.run_forever, daemon=True, name="rayrm-calls").start()
            return self._loop

    def caller(self, settings: CallSettings) -> Caller:
        with self._lock:
            if settings not in self._callers:
                self._callers[settings] = Caller(settings)
            return self._callers[settings]


_background = _Background()


def start_call(settings: CallSettings, request: ScoreRequest) -> Any:
    """Begin a call; a `concurrent.futures.Future` of its ScoreResult, which can be cancelled."""
    loop = _background.loop()
    return asyncio.run_coroutine_threadsafe(_background.caller(settings).call(request), loop)


def service_handle(settings: CallSettings) -> Any:
    """The service's Serve handle in this process."""
    loop = _background.loop()
    return asyncio.run_coroutine_threadsafe(_background.caller(settings).handle(), loop).result()
