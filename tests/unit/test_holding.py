"""One process at a time in an output directory: real processes, real kills."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayrm.errors import RunDirectoryError
from rayrm.train.holding import WRITER, holding, only_writer
from rayrm.train.rank import Hosts

ROOT = Path(__file__).parents[2]


@contextmanager
def process(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()


# Three of them enter as often as they can; within, a directory is made that only one process can make.
CONTENDER = """
    import os, sys, time
    from pathlib import Path
    from rayrm.errors import RunDirectoryError
    from rayrm.train.rundir import only_run

    run, inside, ready = map(Path, sys.argv[1:])
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 3:
        time.sleep(0.01)
    end, entered = time.monotonic() + 2, 0
    while time.monotonic() < end:
        try:
            with only_run(run):
                inside.mkdir()
                entered += 1
                inside.rmdir()
        except RunDirectoryError:
            pass
    print(entered)
"""


def test_of_several_processes_that_come_and_go_never_two_are_in_a_directory(tmp_path: Path) -> None:
    words = [tmp_path / name for name in ("run", "inside", "ready")]
    words[2].mkdir()
    with process(CONTENDER, *words) as a, process(CONTENDER, *words) as b, process(CONTENDER, *words) as c:
        entered = [int(one.communicate(timeout=120)[0]) for one in (a, b, c)]
        assert [one.returncode for one in (a, b, c)] == [0, 0, 0]
    assert min(entered) > 0
    # Nothing was written, so nothing stays.
    assert list(tmp_path.iterdir()) == [tmp_path / "ready"]


def test_a_file_that_was_deleted_under_a_holder_s_hands_is_not_taken_for_held(tmp_path: Path) -> None:
    """The one that waits has the old file open, the holder deletes it, a third makes a new one."""
    file = tmp_path / "lock"
    third: list[holding] = []

    def lock_late(opened: object, how: int) -> None:
        import fcntl

        if not third:  # between the open and the lock, all of it happens
            file.unlink()
            third.append(holding(file, refuse))
            third[0].__enter__()
        fcntl.flock(opened, how)  # type: ignore[call-overload]

    def refuse(holder: str) -> None:
        raise RunDirectoryError(holder)

    with (
        pytest.raises(RunDirectoryError, match=f"process {os.getpid()}"),
        holding(file, refuse, flock=lock_late),
    ):
        pass
    third[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_where_no_directory_can_be_made_nobody_looks_for_ever(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "absent" / "run")
    with pytest.raises(FileExistsError), only_writer(tmp_path / "run", 0, Hosts()):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_one_warning_is_said_and_the_run_goes_on(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(holder: str) -> None:
        raise AssertionError

    def no_lock(opened: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    with caplog.at_level(logging.WARNING, "rayrm.train"):
        for name in ("a", "b"):
            with holding(tmp_path / name, refuse, flock=no_lock):
                pass
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"files in {tmp_path} cannot be locked"
    ]


# What a killed driver left: it holds the directory and goes on writing, until it is killed itself.
OLD_ATTEMPT = """
    import sys, time
    from pathlib import Path
    from rayrm.train.holding import only_writer
    from rayrm.train.rank import Hosts

    run = Path(sys.argv[1])
    with only_writer(run, 0, Hosts()):
        print("in", flush=True)
        while True:
            with (run / "metrics.jsonl").open("a") as out:
                out.write("old\\n")
            time.sleep(0.005)
"""


def test_an_attempt_begins_when_the_one_before_has_stopped_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with process(OLD_ATTEMPT, tmp_path) as old, caplog.at_level(logging.INFO, "rayrm.train"):
        assert old.stdout is not None
        assert old.stdout.readline() == "in\n"
        killed = threading.Timer(2.0, old.send_signal, [signal.SIGKILL])
        killed.start()
        began = time.monotonic()
        with only_writer(tmp_path, 0, Hosts()):
            assert time.monotonic() - began > 1.5
            written = (tmp_path / "metrics.jsonl").read_text()
            time.sleep(0.3)
            assert (tmp_path / "metrics.jsonl").read_text() == written
        killed.join()
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"waiting for an attempt that was cut off (process {old.pid} on " in line
    assert str(tmp_path) in line
    assert not (tmp_path / WRITER).exists()


def test_an_attempt_that_does_not_end_is_named_with_what_to_type(tmp_path: Path) -> None:
    with process(OLD_ATTEMPT, tmp_path) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "in\n"
        message = rf"(?s)`{tmp_path}` \(process {old.pid} on .*Type `kill -9 {old.pid}` on .*same command"
        with (
            pytest.raises(RunDirectoryError, match=message),
            only_writer(tmp_path, 0, Hosts(), patience_s=0.3),
        ):
            pass
        old.kill()
        old.wait()
        with only_writer(tmp_path, 0, Hosts(), patience_s=0.3):
            pass


def _rank(rank: int, run: Path, said: Path) -> None:
    store = dist.FileStore(str(said / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    hosts = Hosts()
    with pytest.raises(RunDirectoryError) as raised, only_writer(run, rank, hosts, patience_s=0.3):
        pass
    (said / f"refused-{rank}").write_text(str(raised.value))
    with only_writer(run, rank, hosts):
        (said / f"in-{rank}").write_text(str(time.time()))
    dist.destroy_process_group()


def test_all_ranks_wait_for_the_first_and_are_refused_in_the_same_words(tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    said.mkdir()
    with process(OLD_ATTEMPT, run) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "in\n"
        ranks = torch.multiprocessing.spawn(_rank, (run, said), nprocs=2, join=False)
        assert ranks is not None
        while not all((said / f"refused-{rank}").exists() for rank in (0, 1)):
            assert not ranks.join(timeout=0.1)
        time.sleep(1.0)
        old.kill()
        killed = time.time()
        while not ranks.join():
            pass
    assert (said / "refused-0").read_text() == (said / "refused-1").read_text()
    assert all(float((said / f"in-{rank}").read_text()) > killed for rank in (0, 1))
