"""How a run ends on a signal: what it started is removed first, and the exit status is the signal's."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayrm.own_ray import keeping_handlers

logger = logging.getLogger("rayrm.rl")

ON_SIGTERM = 128 + signal.SIGTERM


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM (`ray job stop`) ends the block as Ctrl-C does, and then this process by `ON_SIGTERM`.

    As Ctrl-C, since Ray Train stops its workers on that alone; and by its own status at the end of the block,
    since what a signal handler raises within `ray.get` comes back as another exception. Ray Train's handlers
    stay behind: those from before the block come back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def end(number: int, frame: Any) -> None:
        nonlocal told
        if told:
            return
        told = True
        on_interrupt = signal.getsignal(signal.SIGINT)
        if callable(on_interrupt):  # a shell's background jobs ignore it
            on_interrupt(signal.SIGINT, frame)
        raise KeyboardInterrupt

    with keeping_handlers(signal.SIGTERM, signal.SIGINT):
        signal.signal(signal.SIGTERM, end)
        try:
            yield
        except BaseException as error:
            if told:
                raise SystemExit(ON_SIGTERM) from error
            raise
    if told:
        raise SystemExit(ON_SIGTERM)


@contextmanager
def ray_told_to_leave() -> Iterator[None]:
    """SIGTERM ends a block that starts Ray, which sets a handler of its own first, by `ON_SIGTERM`."""
    try:
        yield
    except SystemExit as ended:
        raise SystemExit(ON_SIGTERM) from ended


@contextmanager
def finishing_first(what: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block, which does `what`, has ended, and then do what they do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: Any) -> None:
        waiting.append(number)
        logger.warning("%s first: a few seconds", what)

    with keeping_handlers(signal.SIGTERM, signal.SIGINT):
        signal.signal(signal.SIGTERM, wait)
        signal.signal(signal.SIGINT, wait)
        yield
    if waiting:
        signal.raise_signal(waiting[0])
