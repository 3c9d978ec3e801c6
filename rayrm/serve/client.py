"""[RAY] `RewardClient`: the deployed reward model as a function. Imports no torch; pickles into any actor.

A call returns one finite float for each completion or raises; it never returns None. Until its deadline it
retries what a lost replica or a full queue causes (scoring twice gives the same score): a killed replica
costs its callers time and no request. In process, without a cluster, the same scores come from `RewardModel`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayrm.data.messages import Text
from rayrm.data.tokenize import TextInput
from rayrm.errors import RayrmError, RewardUnavailableError
from rayrm.serve.request import Truncation, check_truncation, row_inputs, text_inputs

logger = logging.getLogger(__name__)

_LOST = (ActorDiedError, ActorUnavailableError, WorkerCrashedError, BackPressureError)
_LATE = (GetTimeoutError, TimeoutError)
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`scores`, one float for each completion in order, and the `version` of the model that gave them."""

    scores: list[float]
    version: str


class RewardClient:
    """Calls the Serve application `name`; also TRL's reward function contract.

    The connection is made on the first call. `deadline_s` is the time a call may take in all, retries
    included.
    """

    def __init__(self, name: str = "reward", *, deadline_s: float = 120.0) -> None:
        self.name = name
        self.deadline_s = deadline_s
        self.__name__ = name  # TRL names the reward's metrics after it
        self._handle: Any = None

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """TRL's reward function: one float for each completion.

        Of the data set's columns, `tools` and `chat_template_kwargs` go to the chat template, as in training.
        """
        return self._score(row_inputs(prompts, completions, columns), None).scores

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        rendered: bool = False,
        truncation: Truncation | None = None,
    ) -> ScoreResult:
        """Score each (prompt, completion); arguments as `RewardModel.score`.

        Raises:
            ScoreError: an input that cannot be scored (named).
            RewardUnavailableError: no such application, or no answer before the deadline.
        """
        inputs = text_inputs(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
        return self._score(inputs, truncation)

    def score_inputs(
        self, inputs: Sequence[TextInput], *, truncation: Truncation | None = None
    ) -> ScoreResult:
        """`score` of inputs that each have tools of their own; as `RewardModel.score_inputs`."""
        return self._score(list(inputs), truncation)

    def _score(self, inputs: list[TextInput], truncation: Truncation | None) -> ScoreResult:
        if _in_event_loop():
            raise RewardUnavailableError(
                f"RewardClient({self.name!r}) was called inside a running event loop, which it would block. "
                "Use `await client.score_async(prompts, completions)` there."
            )
        check_truncation(truncation)
        attempts = _Attempts(self.name, self.deadline_s)
        while True:
            try:
                return self._attempt(inputs, truncation, attempts)
            except RayTaskError as error:
                raise _own_error(self.name, error) from error
            except (*_LOST, *_LATE) as error:
                self._handle = None
                time.sleep(attempts.pause_after(error))

    async def score_async(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        rendered: bool = False,
        truncation: Truncation | None = None,
    ) -> ScoreResult:
        """`score` for asyncio actors: leaves the event loop free; cancelling it cancels the work."""
        inputs = text_inputs(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
        check_truncation(truncation)
        attempts = _Attempts(self.name, self.deadline_s)
        while True:
            try:
                return await self._attempt_async(inputs, truncation, attempts)
            except RayTaskError as error:
                raise _own_error(self.name, error) from error
            except (*_LOST, *_LATE) as error:
                self._handle = None
                await asyncio.sleep(attempts.pause_after(error))

    def __getstate__(self) -> dict[str, Any]:
        # A handle belongs to its process; the receiver fetches its own.
        return {**self.__dict__, "_handle": None}

    def __repr__(self) -> str:
        return f"RewardClient({self.name!r}, deadline_s={self.deadline_s:g})"

    def _attempt(
        self, inputs: list[TextInput], truncation: Truncation | None, attempts: _Attempts
    ) -> ScoreResult:
        response = self._connected().score.remote(inputs, truncation)
        try:
            scores, version = response.result(timeout_s=attempts.left_s())
        except (*_LATE, KeyboardInterrupt):
            response.cancel()
            raise
        except (RayServeException, DeploymentUnavailableError) as error:
            raise self._removed(error) from error
        return ScoreResult(scores, version)

    async def _attempt_async(
        self, inputs: list[TextInput], truncation: Truncation | None, attempts: _Attempts
    ) -> ScoreResult:
        # Finding the application asks the controller and blocks for milliseconds: not in the event loop.
        handle = self._handle or await asyncio.to_thread(self._connected)
        response = handle.score.remote(inputs, truncation)
        try:
            scores, version = await asyncio.wait_for(response, attempts.left_s())
        except (*_LATE, asyncio.CancelledError):
            response.cancel()
            raise
        except (RayServeException, DeploymentUnavailableError) as error:
            raise self._removed(error) from error
        return ScoreResult(scores, version)

    def _connected(self) -> Any:
        """The application's handle, fetched once in each process."""
        if self._handle is None:
            if not ray.is_initialized():
                try:
                    ray.init(address="auto", log_to_driver=False)
                except ConnectionError as error:
                    raise RewardUnavailableError(
                        f"RewardClient({self.name!r}): no Ray cluster runs on this machine. Start the "
                        "service with `rayrm serve MODEL`, or connect first with ray.init(address=...)."
                    ) from error
            try:
                self._handle = serve.get_app_handle(self.name)
            except RayServeException as error:
                raise self._removed(error) from error
        return self._handle

    def _removed(self, error: Exception) -> RewardUnavailableError:
        running = sorted(serve.status().applications)
        return RewardUnavailableError(
            f"no application {self.name!r} runs on this cluster (running: {', '.join(running) or 'none'}). "
            f"Start it with `rayrm serve MODEL --name {self.name}`, or pass the name of one that runs."
            + (f" Serve said: {error}" if self.name in running else "")
        )


class _Attempts:
    """The deadline of one call, and how long to pause before the next attempt."""

    def __init__(self, name: str, deadline_s: float) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self._ends_at = time.monotonic() + deadline_s
        self._pause_s = _FIRST_PAUSE_S

    def left_s(self) -> float:
        return max(self._ends_at - time.monotonic(), 0.0)

    def pause_after(self, error: Exception) -> float:
        """Seconds to wait before trying again; RewardUnavailableError when the deadline comes first."""
        if self.left_s() <= self._pause_s:
            application = serve.status().applications.get(self._name)
            status = "absent" if application is None else application.status.value
            raise RewardUnavailableError(
                f"the reward service {self._name!r} gave no answer within {self._deadline_s:g} s "
                "(application: "
                f"{status}; last: {type(error).__name__}). Raise `deadline_s`, add replicas, or look at "
                "`serve status`."
            ) from error
        pause_s = self._pause_s
        logger.info("reward service %s: %s; again in %.2f s", self._name, type(error).__name__, pause_s)
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
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


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
