"""The model's files: of a checkpoint, saved by a thread while the model trains on, and of a run's end.

For a checkpoint transformers saves a stand-in: the same model with empty tensors of the same shapes, given
the copied weights. At the end files are written aside, and moved into place once all are on the disk.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rayrm.errors import CheckpointError
from rayrm.model.reward_model import ADAPTER_CONFIG, TextForm, save_model
from rayrm.train.checkpoint import checkpoints, is_of_the_disk, sync_directory
from rayrm.train.engine_state import WEIGHT, key_of
from rayrm.train.host_memory import HostMemory

# `drop_partial` deletes what a kill leaves of it.
_ASIDE = ".checkpoint-model.partial"
# Whoever looks for a model looks for these; so they come last.
_LAST = ("config.json", ADAPTER_CONFIG)


class ModelExport:
    """Made before an engine wraps or shards the model."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, text_form: TextForm) -> None:
        hollow: dict[int, Any] = {}
        for parameter in model.parameters():
            hollow[id(parameter)] = torch.nn.Parameter(_empty(parameter), requires_grad=False)
        for buffer in model.buffers():
            hollow[id(buffer)] = _empty(buffer)
        self._stand_in = copy.deepcopy(model, hollow)
        self._tokenizer = tokenizer
        self._text_form = text_form

    def take(
        self,
        model: torch.nn.Module,
        gathered: dict[str, torch.Tensor] | None,
        host: HostMemory,
    ) -> Callable[[Path], None]:
        """Copy the weights (`gathered`, where the model holds parts only); returns what writes the files.

        A weight that the engine's state holds whole is not copied a second time.
        """
        weights: dict[str, torch.Tensor] = {}
        keys: dict[torch.Tensor, str] = {}
        for name, value in (gathered or model.state_dict(keep_vars=True)).items():
            if gathered is None and isinstance(value, torch.nn.Parameter) and not value.requires_grad:
                weights[name] = value.detach()  # frozen: what is written is what it will always be
                continue
            # Tied weights stay one tensor, which transformers saves once.
            whole = key_of(f"model.{name}", WEIGHT, 0, value.numel())
            key = keys.setdefault(value, whole if gathered is None else f"gathered {name}")
            weights[name] = host.hold(key, value).view(value.shape)

        def write(directory: Path) -> None:
            save_model(
                self._stand_in, self._tokenizer, directory, text_form=self._text_form, state_dict=weights
            )

        return write


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """One element, seen in the tensor's shape."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def save_trained(
    model: torch.nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    text_form: TextForm,
    gathered: dict[str, torch.Tensor] | None,
) -> None:
    """Save the model at the end of its run; `gathered` are its weights where it holds parts only.

    Raises:
        CheckpointError: it could not be written. Nothing of it stays.
    """
    aside = output_dir / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_model(model, tokenizer, aside, text_form=text_form, state_dict=gathered)
        _move(aside, output_dir)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_of_the_disk(error):
            raise
        needed, free = _weight_bytes(model, gathered) / 2**20, shutil.disk_usage(output_dir).free / 2**20
        found = checkpoints(output_dir)
        on = (
            f"the run goes on from `{found[-1].name}` and saves the model again."
            if found
            else "as it keeps no checkpoints (`save_strategy`), it trains again from its first step."
        )
        raise CheckpointError(
            f"the trained model could not be written in `{output_dir}`: {error}. Its weights alone need "
            f"{needed:.1f} MiB, and {free:.1f} MiB are free there. Free space, then start the same command "
            f"again: {on}"
        ) from error


def _move(aside: Path, target: Path) -> None:
    """Put all files in `aside` on the disk, then into `target`."""
    files = sorted((file for file in aside.rglob("*") if file.is_file()), key=lambda file: file.name in _LAST)
    for file in files:
        with file.open("rb") as saved:
            os.fsync(saved.fileno())
    places = {target / file.relative_to(aside).parent for file in files}
    for place in places:
        place.mkdir(exist_ok=True)
    for file in files:
        file.replace(target / file.relative_to(aside))
    for place in (*places, target):
        sync_directory(place)
    shutil.rmtree(aside)


def _weight_bytes(model: torch.nn.Module, gathered: dict[str, torch.Tensor] | None) -> int:
    """Of an adapter's model, what is saved is what is trained."""
    adapts = hasattr(model, "peft_config")
    saved = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapts}
    return sum((gathered or saved).get(name, weight).nbytes for name, weight in saved.items())
