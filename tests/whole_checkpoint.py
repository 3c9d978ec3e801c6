"""One rank's checkpoints of a few bytes, written by the real writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rayrm.train.checkpoint import TrainState
from rayrm.train.checkpoint_writer import CheckpointWriter, Snapshot
from rayrm.train.engine_state import EngineState, Slice
from rayrm.train.host_memory import HostMemory


def writer_of(root: Path, limit: int | None = None, *, rank: int = 0, num_ranks: int = 1) -> CheckpointWriter:
    return CheckpointWriter(root, rank, num_ranks, limit, whole=lambda path: None)


def taken(count: int = 50, export: Callable[[Path], None] | None = None) -> Callable[[HostMemory], Snapshot]:
    """A state of `count` numbers, beside what `export` saves of the model."""

    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")

    def take(host: HostMemory) -> Snapshot:
        values = host.hold("w", torch.arange(float(count)))
        state = EngineState({"format": 1}, [Slice("w", "weight", 0, (count,), values)])
        return Snapshot(state, export or write)

    return take


def save_whole(root: Path, state: TrainState, limit: int | None = None) -> Path:
    """Write one checkpoint and wait for it."""
    writer = writer_of(root, limit)
    writer.save(state, taken())
    writer.wait()
    writer.close()
    return root / f"checkpoint-{state.step}"
