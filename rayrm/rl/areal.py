"""AReaL: a reward function whose value is the reward service's score.

    workflow_kwargs = {"reward_fn": "rayrm.rl.areal.reward_fn", ...}  # of areal.workflow.rlvr.RLVRWorkflow

The service is `RAYRM_REWARD`, the model `RAYRM_REWARD_MODEL`, the cluster `RAY_ADDRESS`; or pass an object:
`"reward_fn": RewardFunction("reward", pin_version=...)`, but not with AReaL's local and slurm schedulers:
they send arguments as JSON (`infra/rpc/serialization.py`), so the string only. Contract: areal 1.0.4,
`api/reward_api.py`.

AReaL calls a reward in a pool of processes, which it forks. Such a process must not use the Ray connection of
the process that it was forked from, and another one of its own would be slow to make: it asks its parent
instead, over a socket that only the parent's children can use, and the parent calls the service.
So all calls of a rollout process travel together, however many processes its pool has.

Beware of AReaL's `AsyncRewardWrapper`: after 15 s (`timeout_seconds`), four times over, it takes **0** as the
reward, with a warning. Our deadline (12 s) ends before that: what is then raised it tries again, and raises
at the fourth time; AReaL logs it and drops the trajectory. Its 15 s also count the time that a call waits for
a process of the pool: look for "Returning 0" in its log where the service is slower than the rollout.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import AuthenticationError, parent_process
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Literal, get_args

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, RewardUnavailableError, ScoreError
from rayrm.rl.service import reward_service
from rayrm.serve.client import RewardClient
from rayrm.serve.request import Truncation, check_truncation

TextSource = Literal["messages", "rendered"]

_DEADLINE_S = 12.0
"""Below the 15 s after which AReaL's wrapper gives up a call."""
_ENDS = re.compile(
    r"(?:(?:<\|[^|<>\n]{1,40}\|>|</s>|<eos>|<end_of_turn>|<pad>|\[PAD\]|<\|end▁of▁sentence\|>"
    r"|<｜end▁of▁sentence｜>)\s*)+$"
)
"""Special tokens at the end of an answer: AReaL decodes them too, and the chat template writes them anew."""


class RewardFunction:
    """`reward_fn` for AReaL's workflows; can be called in any process, and pickled.

    Args:
        service, model: the reward service's name, and which of its models; else `RAYRM_REWARD`,
            `RAYRM_REWARD_MODEL`.
        text: "messages": the row's message list `column` and the answer, without the special tokens at its
            end, by the reward model's own chat template. "rendered": the text as the policy saw and wrote it,
            with its special tokens, and what the template writes after the token that ends an answer;
            right only where policy and reward model have one template. A reward model of plain strings
            takes "rendered".
        column: of the data set, for "messages".
        truncation: of a text beyond the model's positions: "left" or "right"; None: refuse.
        deadline_s: of a call in all; keep it below AReaL's 15 s.
        settings: more of `RewardClient`'s (`pin_version`, `hedge_after_s`, ...).
    """

    def __init__(
        self,
        service: str | None = None,
        model: str | None = None,
        *,
        text: TextSource = "messages",
        column: str = "messages",
        truncation: Truncation | None = None,
        deadline_s: float = _DEADLINE_S,
        **settings: Any,
    ) -> None:
        if text not in get_args(TextSource):
            raise ConfigError(f'`text` ({text!r}) must be "messages" or "rendered".')
        self._service, self._model = service, model
        self._text, self._column = text, column
        check_truncation(truncation)
        self._truncation = truncation
        self._settings = {"deadline_s": deadline_s, **settings}
        self._parent: _Address | None = None

    def __call__(
        self,
        prompt: str,
        completions: str,
        prompt_ids: Sequence[int] | None = None,
        completion_ids: Sequence[int] | None = None,
        **data: Any,
    ) -> float:
        """The score of one answer, finite. `data`: the row's columns.

        Raises ScoreError (a row without `column`, a text that cannot be scored), RewardUnavailableError.
        """
        asked = self._input(prompt, completions, data)
        parent = self._parent_here()
        return self._scored(asked) if parent is None else _ask(parent, self, asked)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parent": self._parent_here() or _server.address()}

    def __repr__(self) -> str:
        return f"RewardFunction({self._service!r}, {self._model!r}, text={self._text!r})"

    def _parent_here(self) -> _Address | None:
        """Whom this process asks: who pickled the function, if that is who started this process.

        None: it calls the service itself, as where a controller on another machine sent the function.
        """
        started_by = parent_process()
        if self._parent is None or started_by is None or self._parent.pid != started_by.pid:
            return None
        return self._parent

    def _scored(self, asked: TextInput) -> float:
        return self._client().score_inputs([asked], truncation=self._truncation).scores[0]

    def _client(self) -> RewardClient:
        return reward_service(self._service, self._model, **self._settings)

    def _input(self, prompt: str, completion: str, data: Mapping[str, Any]) -> TextInput:
        if self._text == "rendered":
            return TextInput(prompt, completion, rendered=True, complete_turn=True)
        messages = data.get(self._column)
        if messages is None:
            raise ScoreError(
                f"the row has no column `{self._column}` (it has {', '.join(sorted(data)) or 'none'}), and "
                "`prompt` has the policy's template in it. Name the column of message lists by "
                "RewardFunction(column=...), or score the policy's own text by "
                '"rayrm.rl.areal.rendered_reward_fn".'
            )
        answer = _ENDS.sub("", completion)
        return TextInput(list(messages), [{"role": "assistant", "content": answer}])


class _Address:
    """Where a process answers its children. `pid`: of it; `key`: what they must know."""

    def __init__(self, place: str, key: bytes, pid: int) -> None:
        self.place = place
        self.key = key
        self.pid = pid


class _Server:
    """Answers the children of this process, each in a thread, from the first pickling on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address: _Address | None = None

    def address(self) -> _Address:
        with self._lock:
            if self._address is None or self._address.pid != os.getpid():
                key = secrets.token_bytes(32)
                listener = Listener(None, "AF_UNIX", backlog=256, authkey=key)
                atexit.register(listener.close)
                self._address = _Address(str(listener.address), key, os.getpid())
                threading.Thread(
                    target=_accept, args=(listener,), daemon=True, name="rayrm-reward-children"
                ).start()
            return self._address


_server = _Server()
_asking = threading.local()


def _accept(listener: Listener) -> None:
    while True:
        try:
            connection = listener.accept()
        except (AuthenticationError, EOFError, ConnectionError):
            continue  # not a child of ours, or one that went
        except OSError:
            return  # closed, as the process ends
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: Connection[Any, Any]) -> None:
    """Score what one thread of a child asks, until it goes."""
    with connection:
        while True:
            try:
                function, asked = connection.recv()
            except (EOFError, OSError):
                return
            told: float | Exception
            try:
                told = function._scored(asked)
            except Exception as error:  # whatever it is, the child raises it
                told = error
            try:
                connection.send(told)
            except OSError:
                return  # it waits no longer


def _ask(parent: _Address, function: RewardFunction, asked: TextInput) -> float:
    """The score from the parent, over a connection that this thread keeps."""
    deadline_s = float(function._settings["deadline_s"])
    ends_at = time.monotonic() + deadline_s + 1.0
    try:
        connection = _connection(parent)
        connection.send((function, asked))
        if not connection.poll(max(ends_at - time.monotonic(), 0.0)):
            _asking.connection = None
            raise RewardUnavailableError(
                f"the process {parent.pid} that calls the reward service for its pool gave no answer within "
                f"{deadline_s:g} s. Its log may say why."
            )
        told: float | Exception = connection.recv()
    except (OSError, EOFError, AuthenticationError) as error:
        _asking.connection = None
        raise RewardUnavailableError(
            f"the process {parent.pid} that calls the reward service for its pool is gone "
            f"({type(error).__name__}). Start the pool from a process that lives as long."
        ) from error
    if isinstance(told, Exception):
        raise told
    return told


def _connection(parent: _Address) -> Connection[Any, Any]:
    kept: tuple[int, str, Connection[Any, Any]] | None = getattr(_asking, "connection", None)
    # What a fork inherited is its parent's.
    if kept is None or kept[:2] != (os.getpid(), parent.place):
        kept = os.getpid(), parent.place, Client(parent.place, "AF_UNIX", authkey=parent.key)
        _asking.connection = kept
    return kept[2]


reward_fn = RewardFunction()
"""Scores the row's `messages` and the answer by the reward model's chat template."""
rendered_reward_fn = RewardFunction(text="rendered")
"""Scores the policy's own text."""
