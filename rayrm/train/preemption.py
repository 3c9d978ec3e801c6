"""A run that is told to leave (SIGTERM to its driver) saves after the step it is in, and ends; while data is
still read it ends where it is.

The driver's handler leaves a word in the output directory, which all ranks share. Rank 0 looks for it a few
times a second, and ranks agree after each step, so that all stop after the same one: on several ranks a
broadcast of one number between hosts. A second SIGTERM does what the first would have done before: it ends
the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rayrm.errors import PreemptedError
from rayrm.train.checkpoint import checkpoints
from rayrm.train.rank import Hosts
from rayrm.train.records import read_progress

_WORD = ".leave"
_LOOK_S = 0.25


def tell_to_leave(output_dir: Path) -> None:
    """Leave the word for the run in `output_dir`; whatever begins there takes an older one away."""
    with contextlib.suppress(FileNotFoundError):  # nobody trains there yet
        (output_dir / _WORD).touch()


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
        saved = checkpoints(output_dir)
        where = f"saved as {saved[-1].name}" if saved else "had made no step yet"
        raise PreemptedError(
            f"told to leave (SIGTERM), the run {where} of {standing.get('num_steps', '?')} steps in "
            f"{output_dir}. The same command goes on from there; in Python: "
            "`train(resume_from_checkpoint=True)`."
        )


@contextmanager
def leaving_before_training(output_dir: Path) -> Iterator[None]:
    """Within the block SIGTERM to this process, or the word that ranks would find, ends what it does: no rank
    trains yet, so nothing is to be saved.

    It must stand after whatever starts Ray, which sets a handler of its own.

    Raises:
        PreemptedError: it was told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, told = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL, False

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        signal.signal(signal.SIGTERM, before)
        # What Ctrl-C raises: Ray's calls pass on nothing else that a handler raises while they wait.
        raise KeyboardInterrupt

    word = output_dir / _WORD
    word.unlink(missing_ok=True)
    try:
        try:
            signal.signal(signal.SIGTERM, tell)
            with _looking_for(word):
                yield
        finally:
            signal.signal(signal.SIGTERM, before)
    except BaseException:  # what libraries make of it
        if not told:
            raise
    if told:
        word.unlink(missing_ok=True)
        raise PreemptedError(
            f"told to leave (SIGTERM) before it trained, the run in {output_dir} has nothing to save. The "
            "same command begins again, or goes on from the last checkpoint."
        )


@contextmanager
def _looking_for(word: Path) -> Iterator[None]:
    """Within the block this process gets SIGTERM, once, when the word is there; after it, never."""
    ended, sending = threading.Event(), threading.Lock()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            with sending:
                if word.exists() and not ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    threading.Thread(target=look, name="looking for the word to leave", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with sending:
            pass


class Notice:
    """What a rank knows of it; every rank asks after each step."""

    def __init__(self, output_dir: Path, hosts: Hosts, *, looks: bool) -> None:
        """`looks`: this rank, the first, tells the others."""
        self._word, self._hosts, self._looks = output_dir / _WORD, hosts, looks
        self._next_look = 0.0
        self._told = False

    def leave_now(self) -> None:
        """The run itself has come to where it is to leave, which all ranks know; its driver learns it as if
        it had said so."""
        if self._looks:
            self._word.touch()
            self._told = True

    def to_leave(self) -> bool:
        """Whether all ranks are to save and leave now."""
        if self._looks and not self._told and time.monotonic() >= self._next_look:
            self._told = self._word.exists()
            self._next_look = time.monotonic() + _LOOK_S
        return bool(self._hosts.from_first(int(self._told)))
