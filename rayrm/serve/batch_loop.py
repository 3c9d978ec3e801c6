"""The replica's loop: whenever the model is free, the next batch is planned, computed and answered.

    requests -> tokenized (a thread) -> queue of the version they met -> batch (a thread) -> answers

Nothing computes in the event loop. Several models share the computing thread and take turns; a version that
was replaced goes first, until its last request is answered. No Ray here: a replica is `replica.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from rayrm.errors import OverloadedError, RewardUnavailableError, UnknownModelError, VersionError
from rayrm.serve.ensemble import combine
from rayrm.serve.idle import IdleOffload, WeightsState
from rayrm.serve.loaded import LoadedModel
from rayrm.serve.request import ScoreRequest, ScoreResult
from rayrm.serve.scheduler import QueuedText
from rayrm.serve.scorer import Encoded
from rayrm.serve_settings import Ensemble
from rayrm.settings import nearest

logger = logging.getLogger("rayrm.serve")
_PINNED_S = 30.0
"""So long a version that was replaced takes requests that are pinned to it: more would keep it for good."""
_TOKENIZED_AT_ONCE = 256
"""Texts. A request of thousands takes seconds, in which no other could begin."""
_FAILED = 5
"""Batches in a row. A device may be broken for good, as after an illegal access: another process may help."""
_RATED = 32
"""Batches by whose time a caller is told when to come back."""


@dataclass(slots=True)
class BatchReport:
    """What a batch was, for the metrics."""

    model: LoadedModel
    texts: list[QueuedText]
    num_tokens: int
    """Of the texts, each in full."""
    num_computed: int
    """Tokens, as the batch was planned: what texts begin with alike counts once."""
    seconds: float
    results: list[ScoreResult]


@dataclass(slots=True, eq=False)
class BatchLoop:
    """The models that a replica serves, by name, and the loop over their queues.

    `max_queued`: requests that may wait before new ones are refused; None: no limit. `told` is given a
    report of each batch.
    """

    models: dict[str, LoadedModel]
    ensembles: Mapping[str, Ensemble] = field(default_factory=dict)
    max_queued: int | None = None
    idle_s: float | None = None
    told: Callable[[BatchReport], None] = lambda report: None
    _leaving: list[LoadedModel] = field(default_factory=list)
    _turns: deque[str] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _swapped: bool = False
    _num_failed: int = 0
    _last_failure: BaseException | None = None
    # Of late batches: tokens of their texts, each in full, and seconds.
    _rated: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RATED))
    _idle: IdleOffload = field(init=False)
    # One thread each: a tokenizer must not be entered twice, and the device computes one batch at a time.
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenize"))
    _computing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "compute"))

    def __post_init__(self) -> None:
        self._idle = IdleOffload(self.idle_s)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """The answer to a request: of one version, or of one of each member of an ensemble.

        Raises ScoreError, VersionError, OverloadedError; RewardUnavailableError where it expired.
        """
        self.start()
        name = self._name_of(request)
        self._check_room()
        if name not in self.ensembles:
            model = self._bound(name, request.version)
            with self._bound_to(model):
                return await self._score_by(model, request)
        # All are bound before anything is waited for: a roll in between would mix what was not tried
        # together, or leave a member that nobody computes.
        ensemble = self.ensembles[name]
        members = [self.models[member] for member in ensemble.members]
        version = ".".join(member.place.version for member in members)
        if request.version not in (None, version):
            raise _other_version(name, request.version, version)
        with ExitStack() as held:
            for one in members:
                held.enter_context(self._bound_to(one))
            found = await _all(asyncio.ensure_future(self._score_by(one, request)) for one in members)
        scores, spread = combine(ensemble, [result.scores for result in found])
        timing = replace(found[0].timing, compute_s=sum(result.timing.compute_s for result in found))
        errors = {place: said for result in reversed(found) for place, said in result.errors.items()}
        return replace(
            found[0],
            scores=scores,
            spread=spread,
            version=version,
            model=name,
            truncated=sorted({place for result in found for place in result.truncated}),
            timing=timing,
            errors=errors,
            calibration={},
        )

    def swap(self, model: LoadedModel) -> None:
        """From now on new requests meet `model`; those that met the one before are answered by it."""
        before = self.models.get(model.name)
        self.models[model.name] = model
        if before is not None and before.num_bound:
            before.left_at = time.monotonic()
            self._leaving.append(before)
        self._swapped = True
        self._arrived.set()

    @property
    def weights(self) -> WeightsState:
        """Where the weights are."""
        return self._idle.state

    @property
    def num_waiting(self) -> int:
        """Requests that are not answered yet."""
        return sum(model.num_bound for model in self._all_models())

    @property
    def waiting_tokens(self) -> int:
        return sum(model.queue.waiting_tokens for model in self._all_models())

    def leaving(self) -> list[str]:
        """The versions that were replaced and still answer."""
        return [model.place.version for model in self._leaving]

    def failure(self) -> BaseException | None:
        """Why the loop ended, or no batch can be computed any more, where it is so."""
        if self._num_failed >= _FAILED:
            return self._last_failure
        if self._task is None or not self._task.done():
            return None
        return asyncio.CancelledError() if self._task.cancelled() else self._task.exception()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._computing.shutdown(wait=False, cancel_futures=True)

    def start(self) -> None:
        """Within an event loop; the first request does it too. Idle weights leave from then on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._compute_batches())

    def _all_models(self) -> list[LoadedModel]:
        return [*self._leaving, *self.models.values()]

    def _name_of(self, request: ScoreRequest) -> str:
        name, names = request.model, [*self.models, *self.ensembles]
        if len(names) == 1 and (name is None or request.any_model):
            return names[0]
        if name is None or name not in names:
            said = "none is named" if name is None else f"`model` ({name!r}) is none of them"
            raise UnknownModelError(
                f"{said}: the service has {', '.join(names)}. Pass model={names[0]!r}."
                + nearest(name or "", names)
            )
        return name

    def _bound(self, name: str, version: str | None) -> LoadedModel:
        """The version that a new request meets: the current one, or the pinned one if it left just now."""
        current = self.models[name]
        if version in (None, current.place.version):
            return current
        for model in self._leaving:
            is_late = time.monotonic() - (model.left_at or 0.0) > _PINNED_S
            if model.name == name and model.place.version == version and not is_late:
                return model
        raise _other_version(name, version, current.place.version)

    def _check_room(self) -> None:
        if self.max_queued is not None and self.num_waiting >= self.max_queued:
            retry_after_s = self._wait_s()
            raise OverloadedError(
                f"the reward service has {self.num_waiting} requests waiting, and `max_queued_requests` is "
                f"{self.max_queued}. Come back in {retry_after_s:.1f} s, add replicas, or raise the limit.",
                retry_after_s,
            )

    def _wait_s(self) -> float:
        """Half of what the waiting texts take, by late batches' speed; a second where none is known."""
        if not self._rated:
            return 1.0
        token_s = sum(seconds for _, seconds in self._rated) / sum(tokens for tokens, _ in self._rated)
        running_s = self._rated[-1][1]
        return min(max((self.waiting_tokens * token_s + running_s) / 2, 0.1), 60.0)

    async def _score_by(self, model: LoadedModel, request: ScoreRequest) -> ScoreResult:
        """By a model to which the request is bound."""
        began = time.monotonic()
        encoded = await self._encoded(model, request)
        now = time.monotonic()
        expires_at = None if request.left_s is None else began + request.left_s
        number, entry = model.add(encoded, now - began, expires_at, partial=request.partial)
        self._arrived.set()
        try:
            return await entry.answer
        finally:
            model.remove(number)

    async def _encoded(self, model: LoadedModel, request: ScoreRequest) -> Encoded:
        """The request's ids, some texts at a time: in between, others have their turn at the tokenizer."""
        running, encoded = asyncio.get_running_loop(), Encoded()
        for start in range(0, max(len(request.inputs), 1), _TOKENIZED_AT_ONCE):
            part = (request, start, start + _TOKENIZED_AT_ONCE)
            encoded.extend(await running.run_in_executor(self._tokenizing, model.encode, *part))
        return encoded

    @contextmanager
    def _bound_to(self, model: LoadedModel) -> Iterator[None]:
        model.num_bound += 1
        try:
            yield
        finally:
            model.num_bound -= 1
            if not model.num_bound and model in self._leaving:
                self._leaving.remove(model)

    async def _compute_batches(self) -> None:
        running = asyncio.get_running_loop()
        idle = self._idle
        idle.worked(time.monotonic())
        while True:
            if self._swapped:
                self._swapped = False
                idle.swapped(time.monotonic())
            model = self._next()
            if model is None:
                self._arrived.clear()
                await self._rest(idle)
                continue
            if idle.must_restore:
                idle.begin_restore()
                idle.restored(time.monotonic())
            texts, num_computed = model.queue.take(), model.queue.taken_tokens
            model.began(texts)
            began = time.monotonic()
            computed = running.run_in_executor(self._computing, model.compute, texts)
            await asyncio.wait([computed])
            idle.worked(time.monotonic())
            failure = computed.exception()
            if failure is not None:
                self._num_failed, self._last_failure = self._num_failed + 1, failure
                model.fail(texts, failure)
                continue
            self._num_failed = 0
            seconds = time.monotonic() - began
            results = model.give(texts, computed.result(), seconds)
            num_tokens = sum(len(text.ids) for text in texts)
            self._rated.append((num_tokens, seconds))
            self.told(BatchReport(model, texts, num_tokens, num_computed, seconds, results))

    def _next(self) -> LoadedModel | None:
        """The model whose turn it is, of those with texts that wait."""
        for model in self._all_models():
            for number in model.queue.expire(time.monotonic()):
                entry = model.waiting.get(number)
                if entry is not None and not entry.answer.done():
                    entry.answer.set_exception(
                        RewardUnavailableError("the request waited longer than its caller, and was dropped")
                    )
        for model in self._leaving:
            if len(model.queue):
                return model
        for name in self.models.keys() - set(self._turns):
            self._turns.append(name)
        for _ in range(len(self._turns)):
            name = self._turns[0]
            self._turns.rotate(-1)
            if len(self.models[name].queue):
                return self.models[name]
        return None

    async def _rest(self, idle: IdleOffload) -> None:
        """Until something arrives; the weights leave the device when that takes long."""
        try:
            await asyncio.wait_for(self._arrived.wait(), idle.due_in_s(time.monotonic()))
        except TimeoutError:
            idle.begin_offload()
            try:
                for model in self.models.values():
                    moved = asyncio.get_running_loop().run_in_executor(self._computing, model.model.offload)
                    await moved
            except Exception as error:
                logger.warning("idle weights could not leave the device: %s", error)
                idle.failed()
            else:
                idle.offloaded()
                logger.info("idle for %g s: the weights left the device", self.idle_s)


def _other_version(name: str, wanted: str | None, served: str) -> VersionError:
    return VersionError(
        f"version {wanted!r} of {name!r} is pinned, and {served!r} is served here. Pin that one, leave "
        f"`version` out, or roll back to {wanted!r}.",
        served,
    )


async def _all(tasks: Iterable[asyncio.Task[ScoreResult]]) -> list[ScoreResult]:
    """All results; where one fails, or the caller leaves, the others are cancelled."""
    running = list(tasks)
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
