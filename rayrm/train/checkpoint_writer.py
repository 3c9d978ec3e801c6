"""Checkpoints written beside the steps: the loop waits for a copy in host memory, a thread does the rest.

Each rank's thread writes, hashes and syncs its part, and lists it in `part-<rank>.json`, last. Rank 0's
thread waits for every part, seals the directory and renames it. Threads tell each other by files alone:
collectives are the training's. Whether one failed, ranks agree in `poll`, which each calls once a step.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rayrm.errors import CheckpointError
from rayrm.hashed_file import write_hashed
from rayrm.train.checkpoint import (
    ENGINE_DIR,
    IDENTITY,
    RUN,
    STATE,
    Files,
    TrainState,
    checkpoints,
    is_of_the_disk,
    listed,
    part_of,
    prune_checkpoints,
    random_states,
    seal,
)
from rayrm.train.engine_state import ENGINE, EngineState, Slice
from rayrm.train.host_memory import HostMemory
from rayrm.train.rank import Hosts

logger = logging.getLogger("rayrm.train")
_NICENESS = 10
_LOOK_AGAIN_S = 0.02
# How long a rank that leaves by an error gives the other ranks' threads to finish their parts.
_GRACE_S = 30.0
# How a rank's writing stands; ranks go by the worst.
_WHOLE, _BUSY, _BROKEN = 0, 1, 2
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(slots=True)
class Snapshot:
    """What one rank writes: its engine state, and what `export(directory)` saves of the model.

    `join`, on rank 0: writes and returns a file that tells of those which all ranks have saved.
    """

    engine: EngineState
    export: Callable[[Path], None] | None = None
    join: Callable[[Path], Path] | None = None


class _Abandoned(Exception):
    """The run leaves, or another rank could not write its part."""


@dataclass(slots=True)
class CheckpointWriter:
    """One rank's writing of checkpoints. `whole` is told each that is complete, by rank 0's thread."""

    output_dir: Path
    rank: int
    num_ranks: int
    limit: int | None
    whole: Callable[[Path], None]
    hosts: Hosts = field(default_factory=Hosts)
    _memory: HostMemory = field(default_factory=HostMemory)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(
            1, thread_name_prefix="rayrm-checkpoint", initializer=_step_back
        )
    )
    _pending: Future[None] | None = None
    _step: int = 0
    _bytes: int = 0
    _free: int = 0
    _abandon: threading.Event = field(default_factory=threading.Event)
    _attempt: int = 0

    def __post_init__(self) -> None:
        # A name of this attempt's own: what is left of one that was killed may still be writing.
        self._attempt = self.hosts.from_first(secrets.randbits(31))

    def save(
        self,
        state: TrainState,
        take: Callable[[HostMemory], Snapshot],
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copy this rank's part and begin to write `checkpoint-<step>`; the one before is waited for.

        `beside`: further files of this rank's part, by name.
        All ranks call it. A directory of that name is replaced: runs go on from their newest checkpoint, so
        it is an incomplete one.
        """
        self.wait()
        partial = self._partial(state.step)
        self._memory.begin()
        snapshot = take(self._memory)
        self._memory.settle()
        self._bytes = sum(piece.values.nbytes for piece in snapshot.engine.slices)
        # Made here: the threads see nothing that the next step changes.
        files = {f"rng-{self.rank}.pt": random_states(), **_engine_files(self.rank, snapshot.engine)}
        files |= beside or {}
        if self.rank == 0:
            files[STATE] = state.to_json().encode()
            known = self.output_dir / IDENTITY
            if known.exists():  # a copy of the checkpoint says whose it is, too
                files[RUN] = known.read_bytes()
        self._step = state.step
        self._pending = self._thread.submit(self._write, partial, files, snapshot, state.best_checkpoint)

    def poll(self) -> None:
        """Once a step, on all ranks: raise on every one of them what any rank's writing met."""
        if self._pending is None:
            return
        done = self._pending.done()
        broken = done and self._pending.exception() is not None
        worst = self.hosts.most(_BROKEN if broken else _WHOLE if done else _BUSY)
        if worst == _BROKEN:
            self._fail()
        elif worst == _WHOLE:
            self._pending = None

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole; all ranks call it."""
        while self._pending is not None:
            # Rank 0's thread waits for every part, so that another rank's failure must reach it here.
            _settled(self._pending, timeout_s=1.0 if self.num_ranks > 1 else None)
            self.poll()

    def close(self) -> None:
        """Leave, also by an error on this rank alone: what is being written is finished, or left aside."""
        if self._pending is not None:
            _settled(self._pending, timeout_s=_GRACE_S if self.num_ranks > 1 else None)
            error = self._pending.exception() if self._pending.done() else None
            if error is not None:
                logger.error("%s", self._said(error))
        self._abandon.set()
        self._thread.shutdown()

    def _fail(self) -> None:
        """Remove what was written and raise, on every rank, with the words of the first that failed."""
        assert self._pending is not None
        self._abandon.set()
        _settled(self._pending)
        error = self._pending.exception()
        self._pending = None
        said = None if error is None or isinstance(error, _Abandoned) else self._said(error)
        everyone = self.hosts.joined([] if said is None else [said])
        if self.rank == 0:
            shutil.rmtree(self._partial(self._step), ignore_errors=True)
        raise CheckpointError(everyone[0]) from error

    def _said(self, error: BaseException) -> str:
        if not isinstance(error, Exception) or not is_of_the_disk(error):
            return f"checkpoint {self._step} failed on rank {self.rank}: {type(error).__name__}: {error}"
        good = checkpoints(self.output_dir)
        last = f"The last good one is `{good[-1]}`." if good else "There is no earlier one."
        begins = "goes on from its last good checkpoint" if good else "begins anew"
        needed, free = self._bytes / 2**20, self._free / 2**20
        return (
            f"checkpoint {self._step} could not be written in `{self.output_dir}` by rank {self.rank}: "
            f"{error}. Its engine state alone needs {needed:.1f} MiB, and {free:.1f} MiB were still free "
            f"there. {last} Free space, then start the same command again: the run {begins}."
        )

    def _partial(self, step: int) -> Path:
        return self.output_dir / f".checkpoint-{step}.{self._attempt:x}.partial"

    def _write(self, partial: Path, files: dict[str, bytes], snapshot: Snapshot, best: str | None) -> None:
        try:
            (partial / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
            written: Files = {}
            if snapshot.export is not None:
                written |= listed(partial, _exported(snapshot.export, partial, f".model-{self.rank}"))
            for name, content in files.items():
                written[name] = self._write_file(partial / name, [content])
            if snapshot.engine.slices:
                name = f"{ENGINE_DIR}/rank-{self.rank}.safetensors"
                written[name] = self._write_file(partial / name, _safetensors(snapshot.engine.slices))
            self._list_part(partial, written)
            if self.rank == 0:
                self._complete(partial, snapshot, best)
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            self._free = shutil.disk_usage(self.output_dir).free
            # Frees space at once; what other ranks wrote goes when all have agreed.
            if self.num_ranks == 1:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_file(self, file: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        return write_hashed(file, parts, self._raise_if_abandoned)

    def _raise_if_abandoned(self) -> None:
        if self._abandon.is_set():
            raise _Abandoned

    def _list_part(self, partial: Path, written: Files) -> None:
        aside = partial / f".part-{self.rank}.json"
        self._write_file(aside, [json.dumps(written).encode()])
        aside.rename(partial / part_of(self.rank))

    def _complete(self, partial: Path, snapshot: Snapshot, best: str | None) -> None:
        parts = [partial / part_of(rank) for rank in range(self.num_ranks)]
        while not all(part.exists() for part in parts):
            self._raise_if_abandoned()
            time.sleep(_LOOK_AGAIN_S)
        if snapshot.join is not None:
            joint = partial / part_of(self.num_ranks)
            self._write_file(joint, [json.dumps(listed(partial, [snapshot.join(partial)])).encode()])
            parts.append(joint)
        final = self.output_dir / f"checkpoint-{self._step}"
        seal(partial, parts, final)
        self.whole(final)
        try:
            prune_checkpoints(self.output_dir, self.limit, best)
        except OSError as error:  # this checkpoint is whole: an old one that stays is no reason to end
            logger.warning("an old checkpoint could not be deleted: %s", error)


def _exported(export: Callable[[Path], None], partial: Path, aside: str) -> list[Path]:
    """The files of the model, which may have directories of their own; beside them the ranks write theirs."""
    own = partial / aside
    own.mkdir()
    export(own)
    files = [file.relative_to(own) for file in own.rglob("*") if file.is_file()]
    for entry in own.iterdir():
        entry.rename(partial / entry.name)
    own.rmdir()
    return [partial / file for file in files]


def _step_back() -> None:
    """The steps have the processors first (Linux: threads have a niceness of their own)."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _settled(pending: Future[None], timeout_s: float | None = None) -> None:
    try:
        pending.exception(timeout_s)
    except TimeoutError:
        return


def _engine_files(rank: int, state: EngineState) -> dict[str, bytes]:
    files = {}
    if rank == 0:
        files[f"{ENGINE_DIR}/{ENGINE}"] = _json(state.common)
    if state.slices or state.scalars:
        slices = [[s.key, s.name, s.field, s.offset, s.shape] for s in state.slices]
        part = {"slices": slices, "scalars": state.scalars}
        files[f"{ENGINE_DIR}/rank-{rank}.json"] = _json(part)
    return files


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except TypeError as error:
        raise CheckpointError(
            f"the optimizer's or the schedule's settings hold what a checkpoint cannot ({error}). Take "
            'another `lr_scheduler_type` or optimizer, or set `save_strategy="no"`.'
        ) from error


def _safetensors(slices: list[Slice]) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file of flat tensors, without a copy of them.

    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {}
    end = 0
    for piece in slices:
        begin, end = end, end + piece.values.nbytes
        header[piece.key] = {
            "dtype": _DTYPES[piece.values.dtype],
            "shape": list(piece.values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for piece in slices:
        if piece.values.nbytes:
            yield piece.values.view(torch.uint8).numpy().data
