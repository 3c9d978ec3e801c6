"""Checkpoints: whole or not there, checked byte by byte, and exact."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rayrm.data.order import Cursor
from rayrm.errors import CheckpointError
from rayrm.train.checkpoint import (
    TrainState,
    checkpoints,
    drop_partial,
    prune_checkpoints,
    read_state,
    restore_rng,
    verify_checkpoint,
)
from rayrm.train.checkpoint_writer import CheckpointWriter, Snapshot
from rayrm.train.engine_state import EngineState, Slice, StateReader
from rayrm.train.export import ModelExport
from rayrm.train.host_memory import HostMemory
from tests.small_disk import disk_of
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.whole_checkpoint import save_whole, taken, writer_of


def save(root: Path, step: int) -> Path:
    return save_whole(root, TrainState(step=step))


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
    path = save_whole(tmp_path, state)
    assert path == tmp_path / "checkpoint-7"
    # Equal to the last bit: JSON writes the shortest decimal that reads back as the same float.
    assert read_state(path) == state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with disk_of(2 << 20, tmp_path / "disk") as disk:
        yield disk


def test_a_full_disk_ends_the_run_with_what_to_type_and_frees_what_was_written(small_disk: Path) -> None:
    good = save(small_disk, 1)
    writer = writer_of(small_disk)
    free = shutil.disk_usage(small_disk).free
    writer.save(TrainState(step=2), taken(count=2**20))
    message = rf"`{small_disk}` by rank 0: .*No space left.* needs 4\.0 MiB.*`{good}`.*same command"
    with pytest.raises(CheckpointError, match=message):
        writer.wait()
    writer.close()
    assert checkpoints(small_disk) == [good]
    verify_checkpoint(good)
    assert shutil.disk_usage(small_disk).free == free
    save(small_disk, 2)
    assert len(checkpoints(small_disk)) == 2


def _rank_on_a_small_disk(rank: int, disk: Path, said: Path) -> None:
    store = dist.FileStore(str(said / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    writer = writer_of(disk, rank=rank, num_ranks=2)
    writer.save(TrainState(step=1), taken())
    writer.wait()
    # The second rank's part does not fit; the first's, which waits for it, does.
    writer.save(TrainState(step=2), taken(count=2**20 if rank == 1 else 50))
    with pytest.raises(CheckpointError) as raised:
        writer.wait()
    writer.close()
    (said / f"{rank}").write_text(str(raised.value))
    dist.destroy_process_group()


def test_a_rank_without_room_ends_all_ranks_in_the_same_words(small_disk: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank_on_a_small_disk, (small_disk, tmp_path), nprocs=2)
    first, second = ((tmp_path / f"{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "by rank 1: " in first
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]
    # Sealed once both had written: what one rank lists is not all.
    listed = json.loads((small_disk / "checkpoint-1" / "checkpoint.json").read_text())["files"]
    assert {"rng-0.pt", "rng-1.pt", "engine/rank-0.safetensors", "engine/rank-1.safetensors"} <= set(listed)
    verify_checkpoint(small_disk / "checkpoint-1")


def _poll_for_ever(writer: CheckpointWriter) -> None:
    while True:
        writer.poll()


@pytest.mark.parametrize("waits", [True, False])
def test_the_error_of_a_write_is_told_at_the_next_step_or_save(tmp_path: Path, waits: bool) -> None:
    def fail(directory: Path) -> None:
        raise OSError("no such device")

    writer = writer_of(tmp_path)
    writer.save(TrainState(step=2), taken(export=fail))
    with pytest.raises(CheckpointError, match="no such device"):
        writer.wait() if waits else _poll_for_ever(writer)
    writer.close()
    assert checkpoints(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rayrm.train.checkpoint import TrainState
    from tests.whole_checkpoint import taken, writer_of

    root = Path(sys.argv[1])
    writer = writer_of(root)
    writer.save(TrainState(step=1), taken())
    writer.wait()
    writer.save(TrainState(step=2), taken(count=50_000_000))
    pattern = ".checkpoint-2.*/engine/rank-0.safetensors"
    while not any(file.stat().st_size for file in root.glob(pattern)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".checkpoint-2.*.partial"))) == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert read_state(tmp_path / "checkpoint-1").step == 1
    # What was left aside is cleared by the next attempt.
    drop_partial(tmp_path)
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_what_training_changes_after_a_save_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weight, state = torch.zeros(10_000_000), TrainState(step=1)

    def take(host: HostMemory) -> Snapshot:
        values = host.hold("w", weight)
        return Snapshot(EngineState({"format": 1}, [Slice("w", "weight", 0, tuple(weight.shape), values)]))

    writer = writer_of(tmp_path)
    writer.save(state, take)
    weight.fill_(1.0)
    state.step = 2
    writer.wait()
    writer.close()
    assert not StateReader(tmp_path / "checkpoint-1" / "engine").read("w", "weight").any()
    assert read_state(tmp_path / "checkpoint-1").step == 1


def test_the_writer_prunes_when_a_checkpoint_is_whole_and_keeps_the_best(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_whole(tmp_path, TrainState(step=step, best_checkpoint="checkpoint-1"), limit=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_a_checkpoint_of_the_earlier_layout_is_refused_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "engine.pt").write_bytes(b"earlier")
    with pytest.raises(CheckpointError, match=r"of an earlier layout.*start a new `output_dir`"):
        StateReader(tmp_path)


def test_any_slice_is_read_from_whichever_pieces_hold_it(tmp_path: Path) -> None:
    values = torch.arange(24.0)

    def take(host: HostMemory) -> Snapshot:
        pieces = [Slice("w", "weight", at, (4, 6), values[at : at + 8].clone()) for at in (16, 0, 8)]
        return Snapshot(EngineState({"format": 1}, pieces))

    writer = writer_of(tmp_path)
    writer.save(TrainState(step=1), take)
    writer.wait()
    writer.close()
    reader = StateReader(tmp_path / "checkpoint-1" / "engine")
    for start in range(24):
        for count in range(25 - start):
            found = reader.read("w", "weight", start, count)
            assert torch.equal(found, values[start : start + count])
    with pytest.raises(CheckpointError, match="lacks elements 24 to 25 of `weight` of `w`"):
        reader.read("w", "weight", 20, 5)


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


@pytest.mark.parametrize(
    "name", ["engine/rank-0.safetensors", "engine/engine.json", "model.safetensors", "state.json", "rng-0.pt"]
)
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
    (path / "engine" / "rank-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors` is missing.*no other checkpoint"):
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


def test_a_tokenizer_s_several_templates_are_part_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ messages[0]['content'] }}"}
    synced: list[str] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    model = tiny_model()
    export = ModelExport(model, tokenizer, "conversational")
    writer = writer_of(tmp_path)
    state = EngineState({"format": 1}, [])
    checkpoint = tmp_path / "checkpoint-1"
    part = partial(export.take, model, None, place=checkpoint)
    writer.save(TrainState(step=1), lambda host: Snapshot(state, part(host)))
    writer.wait()
    writer.close()
    verify_checkpoint(checkpoint)
    card = (checkpoint / "README.md").read_text()
    assert f'from_pretrained("{tmp_path.name}/checkpoint-1"' in card
    assert ".model-0" not in card
    listed = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
    there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    assert set(listed) == there - {"checkpoint.json"}
    template = checkpoint / "additional_chat_templates" / "rag.jinja"
    directories = {Path(path).name for path in synced}
    assert {"rag.jinja", "additional_chat_templates"} <= directories
    template.write_text("damaged")
    with pytest.raises(CheckpointError, match=r"rag\.jinja` is corrupt"):
        verify_checkpoint(checkpoint)
    template.unlink()
    with pytest.raises(CheckpointError, match=r"rag\.jinja` is missing"):
        verify_checkpoint(checkpoint)
