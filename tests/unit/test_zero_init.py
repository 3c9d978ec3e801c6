"""When a model is loaded in parts without being asked to be: where whole copies would fill a host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.train import zero_init
from rayrm.train.rank import Hosts, Rank
from rayrm.train.zero_init import builds_in_parts
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")


def chosen(directory: Path, *, num_ranks: int = 2, stage: int = 3) -> tuple[bool, list[str]]:
    said: list[str] = []
    config = RewardConfig(zero_stage=stage)
    return builds_in_parts(str(directory), config, Rank(0, num_ranks, CPU), Hosts(), said.append), said


def test_parts_are_chosen_where_two_copies_take_more_than_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny(tmp_path / "base")
    copies = 2 * 4 * sum(parameter.numel() for parameter in tiny_model().parameters())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(zero_init, "available_memory", lambda: 2 * copies - 2)
    parts, said = chosen(directory)
    assert parts
    assert "a copy for each worker of a host takes" in said[0]
    monkeypatch.setattr(zero_init, "available_memory", lambda: 2 * copies + 2)
    assert chosen(directory) == (False, [])
    # One worker a host; one worker; a stage that shards no weights; an unknown amount.
    monkeypatch.setattr(zero_init, "available_memory", lambda: 2 * copies - 2)
    assert not chosen(directory, num_ranks=1)[0]
    assert not chosen(directory, stage=2)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert not chosen(directory)[0]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(zero_init, "available_memory", lambda: None)
    assert not chosen(directory)[0]


@pytest.mark.parametrize("built", [False, True], ids=["by_name", "built_before"])
def test_one_worker_holds_the_whole_model_and_that_is_said(built: bool, tmp_path: Path) -> None:
    said: list[str] = []
    name = None if built else str(save_tiny(tmp_path / "base"))
    config = RewardConfig(zero_stage=3, zero_init=True)
    assert not builds_in_parts(name, config, Rank(0, 1, CPU), Hosts(), said.append)
    assert said == ["`zero_init` (True) sets nothing here: one worker holds all of the model"]
