"""A run that is told to leave (SIGTERM to its driver) saves after the step it is in, and ends.

The driver's handler leaves a word in the output directory, which all ranks share. Rank 0 looks for it a few
times a second, and ranks agree after each step, so that all stop after the same one: on several ranks a
broadcast of one number between hosts. A second SIGTERM does what the first would have done before: it ends
the process at once. Where Ray knows that it will lose a node of the run, the run saves and goes on: Ray Train
replaces the workers when the node is gone.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rayrm.errors import PreemptedError
from rayrm.train.loop import Asked
from rayrm.train.rank import Hosts
from rayrm.train.records import read_progress

_WORD = ".leave"
_LOOK_S = 0.25
_ASK_S = 2.0  # to ask is a message to an actor from each rank
# What the first rank tells the others.
_NOTHING, _ASK, _LEAVE = range(3)


@contextmanager
def leaving_on_sigterm(output_dir: Path) -> Iterator[None]:
    """Within the block SIGTERM to this process makes the ranks that train in `output_dir` leave.

    Only a main thread is told of signals; in any other nothing changes.

    Raises:
        PreemptedError: they left.
    """
    word = output_dir / _WORD
    word.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def tell(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        word.touch()

    signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        told = word.exists()
        word.unlink(missing_ok=True)
    standing = read_progress(output_dir)
    if told and not standing.get("finished"):
        raise PreemptedError(
            f"told to leave (SIGTERM), the run saved after step {standing['step']} of "
            f"{standing['num_steps']} in {output_dir}. The same command goes on from there; in Python: "
            "`train(resume_from_checkpoint=True)`."
        )


class Notices:
    """What a rank knows of it; every rank asks after each step."""

    def __init__(
        self, output_dir: Path, hosts: Hosts, *, looks: bool, reclaimed: Callable[[], bool] | None = None
    ) -> None:
        """`looks`: this rank, the first, tells the others.

        `reclaimed`: whether nodes of this run are about to be taken away; asked by all ranks together.
        """
        self._word, self._hosts, self._looks, self._reclaimed = output_dir / _WORD, hosts, looks, reclaimed
        self._look_at = 0.0
        self._ask_at = time.monotonic() + _ASK_S
        self._saved = False

    def asked(self) -> Asked:
        """What all ranks are to do now; for nodes to be taken away they save once."""
        told = self._hosts.from_first(self._look() if self._looks else _NOTHING)
        if told == _LEAVE:
            return Asked.LEAVE
        if told == _ASK and self._reclaimed is not None and not self._saved and self._reclaimed():
            self._saved = True
            return Asked.SAVE
        return Asked.NOTHING

    def _look(self) -> int:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            if self._word.exists():
                return _LEAVE
            if now >= self._ask_at:
                self._ask_at = now + _ASK_S
                return _ASK
        return _NOTHING
