"""Checkpoints: whole or not there, checked byte by byte, and exact."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrm.data.order import Cursor
from rayrm.errors import CheckpointError
from rayrm.train.checkpoint import (
    TrainState,
    checkpoints,
    prune_checkpoints,
    read_state,
    restore_rng,
    save_checkpoint,
    verify_checkpoint,
)


def write(directory: Path) -> None:
    (directory / "engine").mkdir()
    (directory / "engine" / "engine.pt").write_bytes(bytes(range(200)))
    (directory / "model.safetensors").write_bytes(b"weights")


def save(root: Path, step: int) -> Path:
    return save_checkpoint(root, TrainState(step=step), rank=0, barrier=lambda: None, write=write)


def test_a_checkpoint_reads_back_what_was_saved(tmp_path: Path) -> None:
    state = TrainState(
        step=7,
        cursor=Cursor(1, 3),
        num_tokens=123456789012,
        loss_sum=0.1 + 0.2,
        interval=[[1 / 3, float(np.float32(0.1)), 1e-300]],
        best_metric=2 / 3,
        best_checkpoint="checkpoint-4",
        num_workers=2,
    )
    path = save_checkpoint(tmp_path, state, rank=0, barrier=lambda: None, write=write)
    assert path == tmp_path / "checkpoint-7"
    # Equal to the last bit: JSON writes the shortest decimal that reads back as the same float.
    assert read_state(path) == state


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        write(directory)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, TrainState(step=2), rank=0, barrier=lambda: None, write=fail)
    assert checkpoints(tmp_path) == []
    # What was left aside is cleared by the next attempt.
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_only_complete_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / ".checkpoint-300.partial").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("name", ["engine/engine.pt", "model.safetensors", "state.json", "rng-0.pt"])
def test_one_wrong_byte_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 5)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}` is corrupt.*Delete.*resume from `checkpoint-3`"):
        read_state(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "engine" / "engine.pt").unlink()
    with pytest.raises(CheckpointError, match=r"engine\.pt` is missing.*no other checkpoint"):
        verify_checkpoint(path)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        verify_checkpoint(tmp_path)
    path = save(tmp_path, 5)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json` cannot be read"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, "checkpoint-1", [1, 4]),
        (1, "checkpoint-1", [1, 4]),
        (1, "checkpoint-4", [4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path: Path, limit: int | None, keep: str | None, left: list[int]
) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, limit, keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_random_states_continue_where_they_stood(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()
    torch.rand(5), random.random(), np.random.rand(7)
    restore_rng(path, 0)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()) == expected


def test_a_rank_that_was_not_there_keeps_its_random_state(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    restore_rng(path, 5)
    assert torch.equal(torch.rand(2), expected)


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    listed = json.loads((path / "checkpoint.json").read_text())["files"]
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(listed) == there - {"checkpoint.json"}
