"""The model that a run ends with: whole, or an error that says what to type."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rayrm.errors import CheckpointError
from rayrm.model.adapters import add_adapter
from rayrm.model.reward_model import load_saved
from rayrm.train.checkpoint import TrainState, drop_partial
from rayrm.train.export import save_trained
from tests.small_disk import disk_of, give_more
from tests.tiny import tiny_model, tiny_tokenizer
from tests.whole_checkpoint import save_whole


def save(directory: Path, model: torch.nn.Module) -> None:
    save_trained(model, tiny_tokenizer(), directory, text_form="conversational", gathered=None)


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != "filler"
    }


@pytest.mark.parametrize("fits", ["nothing", "a part of the weights", "the weights"])
def test_without_room_nothing_half_written_stays_and_the_error_says_what_to_type(
    tmp_path: Path, fits: str
) -> None:
    same_name = tmp_path / "whole" / "disk"  # which the card tells
    same_name.mkdir(parents=True)
    save(same_name, tiny_model(seed=1))
    whole = content(same_name)
    weights = len(whole["model.safetensors"])
    room = {"nothing": 8192, "a part of the weights": weights // 2, "the weights": weights + 16384}[fits]
    with disk_of(2**22, tmp_path / "disk") as disk:
        save_whole(disk, TrainState(step=9))
        save(disk, tiny_model(seed=0))
        before = content(disk)
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - room))
        message = (
            rf"trained model could not be written in `{disk}`: .*(os error 28|No space).*"
            rf"need {weights / 2**20:.1f} MiB, and 0\.\d MiB are free there.*same command.*`checkpoint-9`"
        )
        with pytest.raises(CheckpointError, match=message) as raised:
            save(disk, tiny_model(seed=1))
        assert "Free space, then start the same command" in str(raised.value)
        assert content(disk) == before
        give_more(disk, 2**23)
        save(disk, tiny_model(seed=1))
        assert {name: content(disk)[name] for name in whole} == whole


def test_without_a_checkpoint_the_error_does_not_promise_one(tmp_path: Path) -> None:
    with disk_of(2**16, tmp_path / "disk") as disk, pytest.raises(CheckpointError, match="its first step"):
        save(disk, tiny_model())


def test_of_an_adapter_only_what_is_saved_counts_as_needed(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    model = add_adapter(tiny_model(hidden_size=64, vocab_size=40000), adapter)
    with (
        disk_of(2**15, tmp_path / "disk") as disk,
        pytest.raises(CheckpointError, match=r"alone need 0\.\d MiB"),
    ):
        save(disk, model)


def test_all_of_a_tokenizer_s_templates_come_along_and_nothing_stays_aside(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    templates = {"default": "{{ messages[0]['content'] }}", "rag": "{{ messages[-1]['content'] }}"}
    tokenizer.chat_template = templates
    # What a kill in the middle of saving left.
    (tmp_path / ".checkpoint-model.partial").mkdir()
    (tmp_path / ".checkpoint-model.partial" / "model.safetensors").write_bytes(b"half")
    save_trained(tiny_model(), tokenizer, tmp_path, text_form="conversational", gathered=None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert load_saved(tmp_path).tokenizer.chat_template == templates
    card = (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{tmp_path.name}"' in card
    assert "partial" not in card


def test_what_a_kill_left_of_a_save_is_cleared_by_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-model.partial").mkdir()
    (tmp_path / ".push-abc").mkdir()
    (tmp_path / ".push-abc" / "model.safetensors").write_bytes(b"weights")
    drop_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
