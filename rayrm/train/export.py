"""The model's files of a checkpoint, saved by a thread while the model itself trains on.

transformers saves a stand-in: the same model with empty tensors of the same shapes, given the copied weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rayrm.model.reward_model import TextForm, save_model
from rayrm.train.engine_state import WEIGHT, key_of
from rayrm.train.host_memory import HostMemory


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
