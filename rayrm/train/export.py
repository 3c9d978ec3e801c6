"""The model's files: of a checkpoint, saved by a thread while the model trains on, and of a run's end.

For a checkpoint transformers saves a stand-in: the same model with empty tensors of the same shapes, given
the copied weights. At the end files are written aside, and moved into place once all are on the disk.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rayrm.errors import CheckpointError
from rayrm.model.adapters import ADAPTER_CONFIG
from rayrm.model.attribute_head import AttributeWeights
from rayrm.model.saving import TextForm, save_model
from rayrm.model.sharded import whole_shape
from rayrm.train.checkpoint import checkpoints, is_of_the_disk, sync_directory
from rayrm.train.engine_state import WEIGHT, key_of
from rayrm.train.host_memory import HostMemory

# `drop_partial` deletes what a kill leaves of it.
ASIDE = ".checkpoint-model.partial"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Whoever looks for a model looks for these; so they come last.
_LAST = ("config.json", ADAPTER_CONFIG)


class ModelExport:
    """Made before an engine wraps or shards the model."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        text_form: TextForm,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        hollow: dict[int, Any] = {}
        for parameter in model.parameters():
            hollow[id(parameter)] = torch.nn.Parameter(_empty(parameter), requires_grad=False)
        for buffer in model.buffers():
            hollow[id(buffer)] = _empty(buffer)
        self._stand_in = copy.deepcopy(model, hollow)
        self._tokenizer = tokenizer
        self._text_form, self._objective = text_form, objective

    def take(
        self,
        model: torch.nn.Module,
        gathered: dict[str, torch.Tensor] | None,
        host: HostMemory,
        attributes: AttributeWeights | None = None,
        place: Path | None = None,
    ) -> Callable[[Path], None]:
        """Copy the weights (`gathered`, where the model holds parts only); returns what writes the files.

        `place`: as of `save_model`. A weight that the engine's state holds whole is not copied a second time.
        """
        weights: dict[str, torch.Tensor] = {}
        # A layer in 4 bits adds the scales of its weight: frozen, and of no adapter's files.
        parts = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        parts |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        keys: dict[torch.Tensor, str] = {}
        if gathered is not None and attributes is not None:
            gathered = gathered | attributes.of_reward  # not trained itself, and so maybe left out
        for name, value in (gathered or model.state_dict(keep_vars=True)).items():
            if gathered is None and name not in parts:
                continue
            if gathered is None and isinstance(value, torch.nn.Parameter) and not value.requires_grad:
                weights[name] = value.detach()  # frozen: what is written is what it will always be
                continue
            # Tied weights stay one tensor, which transformers saves once.
            whole = key_of(f"model.{name}", WEIGHT, 0, value.numel())
            key = keys.setdefault(value, whole if gathered is None else f"gathered {name}")
            weights[name] = host.hold(key, value).view(value.shape)

        return partial(self.save, weights=weights, attributes=attributes, place=place)

    def weights(self) -> dict[str, torch.Tensor]:
        """What the model's files hold, by name: empty tensors of those shapes, one where weights are tied."""
        named: dict[str, torch.Tensor] = self._stand_in.state_dict(keep_vars=True)
        return named

    def save(
        self,
        directory: Path,
        weights: dict[str, torch.Tensor],
        attributes: AttributeWeights | None,
        place: Path | None = None,
    ) -> None:
        """Write these weights, or a part of them, and what comes with a model."""
        save_model(
            self._stand_in,
            self._tokenizer,
            directory,
            text_form=self._text_form,
            state_dict=weights,
            attributes=attributes,
            objective=self._objective,
            place=place,
        )

    def save_weights(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a part of the weights alone, as `save_pretrained` does, which does so on rank 0 only."""
        model: Any = self._stand_in
        kept = {k: v for k, v in weights.items() if k not in (model._keys_to_ignore_on_save or ())}
        named = revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))
        save_file({name: value.contiguous() for name, value in named.items()}, file, {"format": "pt"})

    def merged(self, model: Any, gathered: dict[str, torch.Tensor] | None) -> torch.nn.Module:
        """The model with its adapter added to its weights, apart from the one that trains; called once.

        It takes another whole model's memory, on this rank alone.
        """
        whole: Any = self._stand_in
        weights = {
            name: value.detach().to("cpu", copy=True)
            for name, value in (gathered or model.state_dict()).items()
        }
        whole.load_state_dict(weights, strict=False, assign=True)
        for name, buffer in model.named_buffers():
            owner, _, last = name.rpartition(".")
            whole.get_submodule(owner)._buffers[last] = buffer.detach().to("cpu", copy=True)
        added: torch.nn.Module = whole.merge_and_unload()
        return added


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """One element, seen in the tensor's shape."""
    return torch.zeros((), dtype=tensor.dtype).expand(whole_shape(tensor))


def save_trained(
    model: torch.nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    text_form: TextForm,
    gathered: dict[str, torch.Tensor] | None,
    attributes: AttributeWeights | None = None,
    objective: Mapping[str, Any] | None = None,
) -> None:
    """Save the model at the end of its run; `gathered` are its weights where it holds parts only.

    Raises:
        CheckpointError: it could not be written. Nothing of it stays.
    """
    aside = output_dir / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        if gathered is not None and attributes is not None:
            gathered = gathered | attributes.of_reward
        save_model(
            model,
            tokenizer,
            aside,
            text_form=text_form,
            state_dict=gathered,
            attributes=attributes,
            objective=objective,
            place=output_dir,
        )
        move_saved(aside, output_dir)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_of_the_disk(error):
            raise
        raise CheckpointError(why_not_saved(error, output_dir, _weight_bytes(model, gathered))) from error


def why_not_saved(error: Exception, output_dir: Path, needed: int) -> str:
    """What to say where the model's files, of which weights are `needed` bytes, met a problem of the disk."""
    free = shutil.disk_usage(output_dir).free
    found = checkpoints(output_dir)
    on = (
        f"the run goes on from `{found[-1].name}` and saves the model again."
        if found
        else "as it keeps no checkpoints (`save_strategy`), it trains again from its first step."
    )
    return (
        f"the trained model could not be written in `{output_dir}`: {error}. Its weights alone need "
        f"{needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free there. Free space, then start the "
        f"same command again: {on}"
    )


def move_saved(aside: Path, target: Path) -> None:
    """Put all files in `aside` on the disk, then into `target`, instead of the weights of an earlier save."""
    files = sorted((file for file in aside.rglob("*") if file.is_file()), key=lambda file: file.name in _LAST)
    for file in files:
        with file.open("rb") as saved:
            os.fsync(saved.fileno())
    places = {target / file.relative_to(aside).parent for file in files}
    for place in places:
        place.mkdir(exist_ok=True)
    for file in files:
        file.replace(target / file.relative_to(aside))
    new = {file.name for file in files}
    for file in target.glob("model*.safetensors*"):
        if file.name not in new and not new.isdisjoint((WEIGHTS, INDEX)):
            file.unlink()  # weights in one file, where there are several now, or the other way round
    for place in (*places, target):
        sync_directory(place)
    shutil.rmtree(aside)


def _weight_bytes(model: torch.nn.Module, gathered: dict[str, torch.Tensor] | None) -> int:
    """Of an adapter's model, what is saved is what is trained."""
    adapts = hasattr(model, "peft_config")
    saved = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapts}
    return sum((gathered or saved).get(name, weight).nbytes for name, weight in saved.items())
