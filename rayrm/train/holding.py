"""Who may write in an output directory: one process at a time, by a file that it locks (flock) and deletes.

A process that ends lets go, however it ends; the file that a killed one leaves is taken by the next. Where
the file system has no such locks nothing is held, and a warning says so; between hosts they count as far as
the file system that they share sees to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from rayrm.errors import RunDirectoryError
from rayrm.train.rank import Hosts

logger = logging.getLogger("rayrm.train")
WRITER = ".writer.lock"
_LOOK_AGAIN_S = 0.1
_MOST_LOOKS = 1000
_SAY_AFTER_S = 1.0
_PATIENCE_S = 120.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
Flock = Callable[[IO[str], int], None]


LOCK = ".lock"
"""The file by which a directory is held."""


@contextmanager
def holding(file: Path, taken: Callable[[str], None], *, flock: Flock = fcntl.flock) -> Iterator[None]:
    """Hold `file` within the block; its directory is made where there is none.

    `taken` is told who has it, each time that another does: it raises, or returns to have another look.
    """
    while isinstance(lock := _take(file, flock), str):
        taken(lock)
    with lock:
        try:
            yield
        finally:
            # While it is still held: later the path may be another holder's.
            with contextlib.suppress(OSError):
                file.unlink()


def _take(file: Path, flock: Flock) -> IO[str] | str:
    """The locked file, or who holds it."""
    looks = _MOST_LOOKS
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.open("a+")
        except (FileNotFoundError, FileExistsError):
            looks -= 1
            if looks == 0:
                raise
            continue  # a holder that left took the directory along
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                return lock.read().strip() or "unknown"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                lock.close()
                raise
            _warn(file.parent, error.strerror)
        # Another may have deleted it since it was opened, and a third may hold the path's new file.
        if _is_at(lock, file):
            with contextlib.suppress(OSError):  # a full disk: it is held all the same
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return lock
        lock.close()


def _is_at(lock: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


@cache
def _warn(directory: Path, why: str) -> None:
    logger.warning(
        "files in %s cannot be locked (%s): see to it yourself that no two runs, and no workers that "
        "outlived a killed one, write there",
        directory,
        why,
    )


@contextmanager
def only_writer(
    output_dir: Path, rank: int, hosts: Hosts, *, patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """Within the block no other attempt's rank 0 writes in `output_dir`; all ranks enter it together.

    What a killed driver left may train on for a while: it is waited for.

    Raises:
        RunDirectoryError: on all ranks, where it did not end in `patience_s`.
    """
    began, said = time.monotonic(), False

    def wait(holder: str) -> None:
        nonlocal said
        waited = time.monotonic() - began
        if waited > patience_s:
            number, _, host = holder.removeprefix("process ").partition(" on ")
            raise RunDirectoryError(
                f"an attempt that was cut off still trains in `{output_dir}` ({holder}); it has not ended in "
                f"{patience_s:.0f} s. Type `kill -9 {number}` on {host or 'its host'}, then start the same "
                "command again."
            )
        if waited > _SAY_AFTER_S and not said:
            said = True
            logger.info(
                "waiting for an attempt that was cut off (%s) to let go of %s, %.0f s at most",
                holder,
                output_dir,
                patience_s,
            )
        time.sleep(_LOOK_AGAIN_S)

    with contextlib.ExitStack() as held:
        problems = []
        if rank == 0:
            try:
                held.enter_context(holding(output_dir / WRITER, wait))
            except RunDirectoryError as error:
                problems.append(str(error))
        if told := hosts.joined(problems):
            raise RunDirectoryError(told[0])
        yield
