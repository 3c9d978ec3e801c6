"""Folders on a local disk for what is offloaded to it: one for each process, gone when it is."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train import nvme
from rayrm.train.holding import holding
from rayrm.train.nvme import in_own_folders, nvme_folders
from rayrm.train.rank import Hosts, Rank

RANK = Rank(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has all it takes."""
    monkeypatch.setattr(nvme, "_load_operator", lambda rank: None)


def config_on(disk: Path) -> RewardConfig:
    section = {"device": "nvme", "nvme_path": str(disk)}
    zero = {"stage": 3, "offload_optimizer": section, "offload_param": section}
    return RewardConfig(deepspeed={"zero_optimization": zero})


def no_one(holder: str) -> None:
    raise AssertionError(holder)


def test_a_process_has_its_folder_while_it_runs_also_where_it_fails(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    config = config_on(disk)
    assert isinstance(config.deepspeed, dict)
    own = Path(in_own_folders(config.deepspeed["zero_optimization"])["offload_param"]["nvme_path"])
    assert own.parent == disk
    with pytest.raises(NotADirectoryError), nvme_folders(config, RANK, Hosts()):
        (own / ".lock" / "state.swp").mkdir()
    assert disk.exists()
    assert not list(disk.iterdir())


def test_without_a_disk_nothing_is_made_or_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(nvme, "_load_operator", asked.append)
    monkeypatch.setattr(nvme, "_folder", asked.append)
    with nvme_folders(RewardConfig(zero_stage=3), RANK, Hosts()):
        assert asked == []


def test_what_a_killed_process_left_is_deleted_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, living, other = (tmp_path / name for name in ("rayrm-a-1", "rayrm-b-2", "rayrm-notes"))
    for folder in (left, living, other):
        folder.mkdir()
        (folder / "state.swp").write_text("x")
    (left / ".lock").write_text("process 1 on a")
    with (
        caplog.at_level(logging.INFO, "rayrm.train"),
        holding(living / ".lock", no_one),
        nvme_folders(config_on(tmp_path), RANK, Hosts()),
    ):
        assert not left.exists()
        assert (living / "state.swp").exists()
        assert (other / "state.swp").exists()
    assert f"deleted {left}, which a killed run left" in caplog.text


def test_a_folder_is_locked_before_another_run_can_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen without a holder, it would be deleted by a run that starts at the same moment."""
    seen: list[list[Path]] = []

    def looked(file: Path, *args: Any, **kwargs: Any) -> Any:
        seen.append(list(tmp_path.glob("rayrm-*")))
        return holding(file, *args, **kwargs)

    monkeypatch.setattr(nvme, "holding", looked)
    with nvme_folders(config_on(tmp_path), RANK, Hosts()):
        (own,) = tmp_path.glob("rayrm-*")
        with pytest.raises(AssertionError, match=f"process {os.getpid()}"), holding(own / ".lock", no_one):
            pass
    assert seen == [[]]


def test_where_a_disk_has_no_locks_nothing_is_taken_for_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = tmp_path / "rayrm-b-2"
    living.mkdir()
    (living / ".lock").write_text("process 2 on b")

    def without_locks(lock: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(nvme.fcntl, "flock", without_locks)
    with nvme_folders(config_on(tmp_path), RANK, Hosts()):
        assert living.exists()


def test_a_path_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(ConfigError, match=rf"`nvme_path` \({file}\) cannot be written to \(Not a directory\)"),
        nvme_folders(config_on(file), RANK, Hosts()),
    ):
        raise AssertionError(os.getpid())
