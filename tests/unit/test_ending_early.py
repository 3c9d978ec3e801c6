"""SIGTERM before the ranks begin: what is done ends where it is, and the handler is what it was."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rayrm.errors import PreemptedError
from rayrm.train.preemption import leaving_before_training, tell_to_leave


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The SIGTERMs that came to the handler that was there before."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    yield told
    signal.signal(signal.SIGTERM, before)


@contextmanager
def in_a_moment(act: Callable[..., None], *given: object) -> Iterator[None]:
    threading.Timer(0.2, act, given).start()
    yield


def read_for_long() -> None:
    """As libraries do, with a handler for whatever fails."""
    try:
        time.sleep(60)
    except Exception as error:
        raise AssertionError from error


def test_it_ends_what_is_read_and_says_how_to_go_on(heard: list[int], tmp_path: Path) -> None:
    began = time.monotonic()
    said = rf"run in {tmp_path} has nothing to save. The same command"
    sigterm = in_a_moment(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(PreemptedError, match=said), leaving_before_training(tmp_path), sigterm:
        read_for_long()
    assert time.monotonic() - began < 50
    assert heard == []
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_what_a_library_makes_of_the_signal_changes_nothing(heard: list[int], tmp_path: Path) -> None:
    def swallowed() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)

    def renamed() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise OSError("the read was cut off") from None

    for read in (swallowed, renamed):
        with pytest.raises(PreemptedError), leaving_before_training(tmp_path):
            read()
    assert heard == []


def test_the_word_that_ranks_would_find_ends_it_too_and_an_older_one_does_not(
    heard: list[int], tmp_path: Path
) -> None:
    tell_to_leave(tmp_path)
    with leaving_before_training(tmp_path):
        time.sleep(1.0)
    word = in_a_moment(tell_to_leave, tmp_path)
    with pytest.raises(PreemptedError), leaving_before_training(tmp_path), word:
        read_for_long()
    tell_to_leave(tmp_path)  # for the ranks of whatever comes now
    time.sleep(1.0)
    assert heard == []


def test_ctrl_c_and_what_fails_within_stay_what_they_are(heard: list[int], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), leaving_before_training(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="a row"), leaving_before_training(tmp_path):
        raise ValueError("a row")
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
