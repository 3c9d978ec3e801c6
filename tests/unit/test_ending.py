"""A run that is told to leave ends as by Ctrl-C, removes what it started, and exits by its own status."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from rayrm.rl.ending import ON_SIGTERM, ending_on_sigterm, finishing_first


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Each test begins with Python's own handlers, whatever Ray left in this process, and leaves them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    left = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    for number, handler in zip(numbers, left, strict=True):
        signal.signal(number, handler or signal.SIG_DFL)


def leave(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # is interrupted


def leave_as_ray_tells_it() -> None:
    """`ray.get` makes another exception of what a handler raised."""
    try:
        leave()
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def leave_unheard() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        leave()


@pytest.mark.parametrize("work", [leave, leave_as_ray_tells_it, leave_unheard])
def test_sigterm_is_the_exit_status_whatever_a_library_makes_of_the_interrupt(
    work: Callable[[], None],
) -> None:
    with pytest.raises(SystemExit) as ended, ending_on_sigterm():
        work()
    assert ended.value.code == ON_SIGTERM == 143


def test_sigterm_ends_a_block_whose_ctrl_c_is_ignored_as_in_a_shells_background() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended, ending_on_sigterm():
            leave()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == ON_SIGTERM


def test_other_ends_stay_what_they_are() -> None:
    with pytest.raises(KeyboardInterrupt), ending_on_sigterm():
        leave(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), ending_on_sigterm():
        raise ValueError("mine")
    with ending_on_sigterm():
        pass


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
)
def test_what_is_being_removed_is_removed_before_a_signal_is_followed(
    number: signal.Signals, end: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    removed = []

    def remove() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        removed.append(True)

    with pytest.raises(end), ending_on_sigterm(), finishing_first("removing it"):
        remove()
    assert removed
    assert "removing it first" in caplog.text
