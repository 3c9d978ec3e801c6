"""Offload to NVMe: what a machine must have for it, and a folder for each process to write to.

DeepSpeed 0.19 names its files by rank and leaves them, so that two runs in one `nvme_path` would read each
other's. Each process has a folder of its own there, locked while it can be seen (`holding`) and deleted at
its end; what a killed process left is deleted by the next run that comes by, where the disk has locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import read_deepspeed
from rayrm.deepspeed_sections import uses_nvme
from rayrm.errors import ConfigError
from rayrm.train.holding import LOCK, holding
from rayrm.train.rank import Hosts, Rank

logger = logging.getLogger("rayrm.train")
_SECTIONS = ("offload_optimizer", "offload_param")
_PREFIX = "rayrm-"
# Containers of one host may have its name, and process ids that are equal.
_PROCESS = secrets.token_hex(4)
_OR = 'Or set `device` to "cpu".'


def in_own_folders(zero: dict[str, Any]) -> dict[str, Any]:
    """The section `zero_optimization` with this process's own folder as each `nvme_path`."""
    own = dict(zero)
    for section in _SECTIONS:
        if path := _path_of(zero, section):
            own[section] = {**zero[section], "nvme_path": str(_own_folder(path))}
    return own


def _path_of(zero: dict[str, Any], section: str) -> str | None:
    path: str | None = (zero.get(section) or {}).get("nvme_path")
    return path


def _own_folder(nvme_path: str) -> Path:
    return Path(nvme_path) / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{_PROCESS}"


@contextlib.contextmanager
def nvme_folders(config: RewardConfig, rank: Rank, hosts: Hosts) -> Iterator[None]:
    """Around a rank's run: where it asks for NVMe, this process's folders there; all ranks enter it together.

    Raises:
        ConfigError: on all ranks, where one's machine cannot read and write so, or not in that folder.
    """
    table = {} if config.deepspeed is None else read_deepspeed(config.deepspeed)
    if not uses_nvme(table):
        yield
        return
    zero = table["zero_optimization"]
    with contextlib.ExitStack() as held:
        problems = []
        try:
            _load_operator(rank)
            for path in {path for section in _SECTIONS if (path := _path_of(zero, section))}:
                held.enter_context(_folder(path))
        except ConfigError as error:
            problems.append(str(error))
        if told := hosts.joined(problems):
            raise ConfigError(told[0])
        yield


def _load_operator(rank: Rank) -> None:
    from rayrm.train.zero import async_io_builder

    builder = async_io_builder(rank.device)
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            "offload to NVMe (`deepspeed.zero_optimization`, device `nvme`) reads and writes by libaio, and "
            f"it or g++ is not here. Type `apt-get install libaio-dev g++` on every node. {_OR}"
        )
    if rank.index == 0:
        logger.info("loading DeepSpeed's `async_io` for NVMe: the first time it is compiled, in some minutes")
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        # DeepSpeed's requirement: in this environment, which need not be the shell's.
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        # A compiler's own words, where it was one that failed: before them stands what was called.
        lines = str(error).splitlines()
        said = " ".join("; ".join([one for one in lines if "error:" in one][:3] or lines).split())
        raise ConfigError(
            "offload to NVMe needs DeepSpeed's `async_io`, which is compiled when it is first used, and "
            f"could not be: {said[:300]}. It needs `apt-get install g++ libaio-dev` and `pip install ninja` "
            f"on every node. {_OR}"
        ) from error


@contextlib.contextmanager
def _folder(nvme_path: str) -> Iterator[None]:
    own = _own_folder(nvme_path)
    # Unseen until it is locked: what has no holder is deleted.
    made = own.with_name(f".{own.name}")
    try:
        for folder in Path(nvme_path).glob(f"{_PREFIX}*"):
            _delete_if_left(folder)
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`nvme_path` ({nvme_path}) cannot be written to ({error.strerror}). Name a folder of a local "
            f"disk, which this user may write to on every node. {_OR}"
        ) from error

    def taken(holder: str) -> None:
        raise ConfigError(f"`nvme_path`: {own} is written to by {holder}. Let that run end.")

    with holding(made / LOCK, taken):
        made.rename(own)
        try:
            yield
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _delete_if_left(folder: Path) -> None:
    """Delete a folder whose process has ended; one without a lock is not known to be left."""
    if not (folder / LOCK).exists():
        return
    with contextlib.suppress(_Lives), holding(folder / LOCK, _lives, flock=_surely):
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("deleted %s, which a killed run left", folder)


def _surely(lock: IO[str], how: int) -> None:
    """Lock; where the disk has no locks, nobody knows who lives."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        raise
    except OSError as error:
        lock.close()
        raise _Lives(str(error)) from error


class _Lives(Exception):
    """The folder's process lives."""


def _lives(holder: str) -> None:
    raise _Lives(holder)


@contextlib.contextmanager
def buffers_told() -> Iterator[None]:
    """Say what to type where DeepSpeed, inside, finds its buffers too small for a weight."""
    try:
        yield
    except AssertionError as error:
        if "buffer" not in str(error):
            raise
        raise ConfigError(
            f"offload of parameters to NVMe: {error}. Set "
            "`deepspeed.zero_optimization.offload_param.buffer_size` to the elements of the largest weight, "
            "divided by the number of workers, or more; `buffer_count` of them are kept in memory."
        ) from error
