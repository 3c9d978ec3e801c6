"""Checkpoints: written aside, listed with checksums, renamed into place; a kill leaves the last good one.

    checkpoint-<step>/
        model.safetensors, config.json, tokenizer ...   loads in stock transformers (PEFT: the adapter)
        engine/                                          weights and optimizer by parameter (engine_state.py)
        rng-<rank>.pt                                    random states
        state.json                                       where training stands (`TrainState`)
        run.json                                         the settings and data of its run
        checkpoint.json                                  every file's size and sha256; written last

All ranks write into one directory, which therefore must lie on storage that they share. Who writes, and when,
is `checkpoint_writer.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rayrm.data.order import Cursor
from rayrm.errors import CheckpointError

MANIFEST = "checkpoint.json"
STATE = "state.json"
RUN = "run.json"
IDENTITY = "identity.json"
"""The same in the run's own directory (`rundir.py`)."""
ENGINE_DIR = "engine"
PUSH_ASIDE = ".push-"
"""How the copies begin that a push to the hub uploads; a kill may leave one."""
Files = dict[str, dict[str, Any]]
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(slots=True)
class TrainState:
    """Where training stands. `interval` holds the metrics of steps that are done but not yet logged.

    `skipped_steps` counts those that were left out, for a loss that was not finite. `max_tokens` is the run's
    token budget, which a run that goes on from here keeps (None: not written). `best_metric` is the best of
    all evaluations, `best_checkpoint_metric` that of `best_checkpoint`.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    epoch: float = 0.0
    num_tokens: int = 0
    num_tokens_computed: int = 0
    loss_sum: float = 0.0
    skipped_steps: int = 0
    interval: list[list[float]] = field(default_factory=list)
    best_metric: float | None = None
    best_checkpoint: str | None = None
    best_checkpoint_metric: float | None = None
    num_workers: int = 1
    max_tokens: int | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    """The states of transformers' callbacks that keep one, by class; a list where a class has several."""

    @property
    def train_loss(self) -> float:
        """The mean over all steps that were not left out."""
        return self.loss_sum / max(self.step - self.skipped_steps, 1)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        fields = json.loads(text)
        return cls(**{**fields, "cursor": Cursor(**fields["cursor"])})


def restore_rng(checkpoint: Path, rank: int) -> None:
    """Set this rank's random states to what they were; a rank that was not there then keeps its own."""
    file = checkpoint / f"rng-{rank}.pt"
    if not file.exists():
        return
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["torch"])
    if _has_device() and len(states["cuda"]):
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def random_states() -> bytes:
    """This process's random states, as `rng-<rank>.pt` holds them."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        # Of this process's device, which another host or a later run may number otherwise.
        "cuda": torch.cuda.get_rng_state() if _has_device() else torch.empty(0),
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            [int(key) for key in keys],
            *[float(x) if isinstance(x, float) else int(x) for x in rest],
        ],
    }
    content = io.BytesIO()
    torch.save(states, content)
    return content.getvalue()


def _has_device() -> bool:
    """Whether this process uses a GPU; asking would take one."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def read_state(checkpoint: Path) -> TrainState:
    """Where training stood when this checkpoint was written; verifies every file first."""
    verify_checkpoint(checkpoint)
    return TrainState.from_json((checkpoint / STATE).read_text())


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def drop_partial(output_dir: Path) -> None:
    """Delete what attempts that were cut off have left: checkpoints that never became whole, copies for the
    hub."""
    for pattern in (".checkpoint-*.partial", f"{PUSH_ASIDE}*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise CheckpointError naming the first file that is missing or not as it was written."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(
            f"`{checkpoint}` is not a complete checkpoint (no `{MANIFEST}`). Pass a directory "
            "`checkpoint-<step>` that rayrm wrote."
        )
    try:
        listed = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{manifest}` cannot be read ({error}). {_other(checkpoint)}") from error
    for name, expected in listed.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file `{file}` is missing. {_other(checkpoint)}")
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint file `{file}` is corrupt (checksum differs). {_other(checkpoint)}"
            )


def prune_checkpoints(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the one named `keep` stays."""
    if limit is None:
        return
    found = checkpoints(output_dir)
    spare = [path for path in found[:-1] if path.name != keep]
    for path in spare[: max(0, len(found) - limit)]:
        # First what makes it a checkpoint: cut off half-way, this leaves none that looks complete.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def _other(checkpoint: Path) -> str:
    others = [path.name for path in checkpoints(checkpoint.parent) if path != checkpoint]
    if others:
        return (
            f"Delete `{checkpoint}` to resume from `{others[-1]}`."
            if int(others[-1].rpartition("-")[2]) < int(checkpoint.name.rpartition("-")[2])
            else f"Resume from `{others[-1]}` instead."
        )
    return f"Delete `{checkpoint}` and start again: the run has no other checkpoint."


def part_of(rank: int) -> str:
    """The file in which a rank lists what it wrote; its presence says that all of it is on the disk."""
    return f"part-{rank}.json"


def listed(directory: Path, files: Iterable[Path]) -> Files:
    """Sizes and checksums of files in `directory`, which are on the disk afterwards."""
    return {
        str(file.relative_to(directory)): {"size": file.stat().st_size, "sha256": _sha256(file, sync=True)}
        for file in files
    }


def seal(partial: Path, parts: Iterable[Path], final: Path) -> None:
    """Make the files that `parts` list the checkpoint `final`."""
    files: Files = {}
    for part in parts:
        files |= json.loads(part.read_text())
        part.unlink()
    with (partial / MANIFEST).open("w") as out:
        json.dump({"files": dict(sorted(files.items()))}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    for directory in {(partial / name).parent for name in files}:
        sync_directory(directory)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_directory(final.parent)


def _sha256(file: Path, *, sync: bool = False) -> str:
    with file.open("rb") as handle:
        if sync:
            os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_of_the_disk(error: Exception) -> bool:
    """Whether a write failed for want of room, or as the file system has it otherwise."""
    # tokenizers raises a bare Exception, with Rust's words.
    return isinstance(error, OSError | SafetensorError) or (
        type(error) is Exception and "(os error " in str(error)
    )


def sync_directory(directory: Path) -> None:
    """On disk are the names of what `directory` holds."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
