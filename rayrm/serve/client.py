"""[RAY] `RewardClient`: the deployed reward model as a function. Imports no torch; pickles into any actor.

A call returns one finite float for each completion or raises; it never returns None. Until its deadline it
retries what a lost replica or a full queue causes: a killed replica costs its callers time and no request.
In process, without a cluster, the same scores come from `RewardModel`. How calls travel: `caller.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrm.data.messages import Text
from rayrm.data.packing import Ids
from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, RewardUnavailableError
from rayrm.serve.caller import CallSettings, service_handle, start_call
from rayrm.serve.request import (
    Scorable,
    ScoreRequest,
    ScoreResult,
    Truncation,
    check_truncation,
    id_inputs,
    row_inputs,
    text_inputs,
)
from rayrm.serve.roll import RollResult, roll, service_status

_ROLL_WAIT_S = 600.0


class RewardClient:
    """Calls the Serve application `name`; also TRL's reward function contract.

    Works in the driver, actors, Train workers, other deployments and other drivers: each process makes its
    own connection on the first call. Calls of few texts that arrive together, from any thread or event loop
    of the process, travel together.

    Args:
        name: of the application.
        model: which of its models or ensembles; None: its only one.
        deadline_s: the time a call may take in all, retries included.
        pin_version: the only version that may answer; a call meets VersionError where another serves.
        hedge_after_s: send a call that has no answer after so long to a second replica too, and take the
            first answer. None: don't.
        retry_overload: try again, until the deadline, where the queue is full; else OverloadedError at once.
        coalesce: let calls of few texts travel together.
        prefer_local: ask a replica on this process's node first.
    """

    def __init__(
        self,
        name: str = "reward",
        *,
        model: str | None = None,
        deadline_s: float = 120.0,
        pin_version: str | None = None,
        hedge_after_s: float | None = None,
        retry_overload: bool = True,
        coalesce: bool = True,
        prefer_local: bool = False,
    ) -> None:
        self._settings = CallSettings(
            name=name,
            deadline_s=deadline_s,
            hedge_after_s=hedge_after_s,
            retry_overload=retry_overload,
            coalesce=coalesce,
            prefer_local=prefer_local,
        )
        self.name = name
        self.model = model
        self.deadline_s = self._settings.deadline_s
        self.pin_version = pin_version
        self.__name__ = model or name  # TRL names the reward's metrics after it

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
        """Score each (prompt, completion), all by one version; arguments as `RewardModel.score`.

        Raises:
            ScoreError: an input that cannot be scored (named).
            VersionError: another version serves than the pinned one.
            OverloadedError: the queue is full, without `retry_overload`.
            RewardUnavailableError: no such application, or no answer before the deadline.
        """
        inputs = text_inputs(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
        return self._score(inputs, truncation)

    def score_ids(
        self, sequences: Sequence[Sequence[int] | Ids], *, truncation: Truncation | None = None
    ) -> ScoreResult:
        """`score` of token ids as the model's own tokenizer gives them; int32 arrays travel fastest."""
        return self._score(id_inputs(sequences), truncation)

    def score_inputs(
        self, inputs: Sequence[TextInput], *, truncation: Truncation | None = None
    ) -> ScoreResult:
        """`score` of inputs that each have tools of their own; as `RewardModel.score_inputs`."""
        return self._score(list(inputs), truncation)

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
        """`score` for asyncio: leaves the event loop free; cancelling it cancels the work."""
        inputs = text_inputs(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
        return await self.ask(self._request(inputs, truncation))

    async def score_ids_async(
        self, sequences: Sequence[Sequence[int] | Ids], *, truncation: Truncation | None = None
    ) -> ScoreResult:
        """`score_ids` for asyncio."""
        return await self.ask(self._request(id_inputs(sequences), truncation))

    async def score_inputs_async(
        self, inputs: Sequence[TextInput], *, truncation: Truncation | None = None
    ) -> ScoreResult:
        """`score_inputs` for asyncio."""
        return await self.ask(self._request(list(inputs), truncation))

    async def ask(self, request: ScoreRequest) -> ScoreResult:
        """The answer to a request as it stands, whatever this client's `model` and `pin_version`."""
        return await asyncio.wrap_future(start_call(self._settings, request))

    def roll(
        self, version: str | Path, *, model: str | None = None, wait_s: float = _ROLL_WAIT_S
    ) -> RollResult:
        """Let every replica serve another version; returns when they do. No request is lost.

        `version`: published beside the one that serves, or a published model's directory. It is loaded
        beside the old one and must give the scores stored at its publication; else RollError, and the old one
        serves on. The registry's `current` follows.
        """
        if not isinstance(version, str | Path):
            raise ConfigError(
                f"`version` ({version!r}) must be a published version, or its directory. To go back call "
                "`rollback()`."
            )
        return roll(service_handle(self._settings), self.name, version, model or self.model, wait_s)

    def rollback(self, *, model: str | None = None, wait_s: float = _ROLL_WAIT_S) -> RollResult:
        """Roll back to the version before the latest roll."""
        return roll(service_handle(self._settings), self.name, None, model or self.model, wait_s)

    def status(self, *, wait_s: float = 30.0) -> dict[str, Any]:
        """What is served: versions, the latest roll and its error, and how each replica stands."""
        return service_status(service_handle(self._settings), self.name, wait_s)

    def __repr__(self) -> str:
        of = f", model={self.model!r}" if self.model else ""
        return f"RewardClient({self.name!r}{of}, deadline_s={self.deadline_s:g})"

    def _score(self, inputs: Sequence[Scorable], truncation: Truncation | None) -> ScoreResult:
        if in_event_loop():
            raise RewardUnavailableError(
                f"RewardClient({self.name!r}) was called inside a running event loop, which it would block. "
                "Use `await client.score_async(prompts, completions)` there."
            )
        call = start_call(self._settings, self._request(inputs, truncation))
        try:
            result: ScoreResult = call.result()
        except KeyboardInterrupt:
            call.cancel()
            raise
        return result

    def _request(self, inputs: Sequence[Scorable], truncation: Truncation | None) -> ScoreRequest:
        check_truncation(truncation)
        return ScoreRequest(inputs, self.model, truncation, self.pin_version)


def in_event_loop() -> bool:
    """Whether this thread runs an event loop, which a call that waits would block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
