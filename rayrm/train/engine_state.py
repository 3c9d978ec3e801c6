"""What an engine needs to go on, kept by parameter, so that any number of ranks and any ZeRO stage reads it.

    engine/
        engine.json            the optimizer's class and settings, the schedule, the loss scale
        rank-<r>.safetensors   flat slices of weights and of the optimizer's moments
        rank-<r>.json          for each slice its parameter, field, offset and whole shape; step counters

An optimizer's own tensor holds one parameter (plain PyTorch) or pieces of many (a ZeRO partition): a
`Holding` says which. Padding between pieces is not kept; where it is read, it is zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rayrm.errors import CheckpointError
from rayrm.train.host_memory import HostMemory
from rayrm.train.loss_scale import LossScale

ENGINE = "engine.json"
WEIGHT = "weight"
_FORMAT = 1
# How torch computes the update on this machine, which another may do otherwise.
_OF_THE_MACHINE = frozenset({"params", "param_names", "fused", "foreach", "capturable", "differentiable"})


@dataclass(frozen=True, slots=True)
class Span:
    """`count` elements of a parameter from `start` on, which lie at `at` in the optimizer's tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Holding:
    """One of the optimizer's own tensors, the spans that it holds, and the parameter group it is of."""

    tensor: torch.Tensor
    spans: Sequence[Span]
    group: int

    @classmethod
    def whole(cls, name: str, parameter: torch.Tensor, group: int) -> Holding:
        return cls(parameter, [Span(name, tuple(parameter.shape), 0, 0, parameter.numel())], group)


@dataclass(frozen=True, slots=True)
class Slice:
    """Flat `values` of `field` of the parameter `name` from `offset` on; `shape` is the whole field's."""

    name: str
    field: str
    offset: int
    shape: tuple[int, ...]
    values: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.name}|{self.field}|{self.offset}"


@dataclass(slots=True)
class EngineState:
    """One rank's share. `scalars`: by parameter and field, what is one number; `common` is every rank's."""

    common: dict[str, Any]
    slices: list[Slice] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)


def key_of(name: str, kind: str, start: int, count: int) -> str:
    """By what the host's copy of these elements is known."""
    return f"{name}|{kind}|{start}+{count}"


def whole_holdings(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Holding]:
    """Of an optimizer over the module's own parameters."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        Holding.whole(names[parameter], parameter, index)
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    ]


def common_state(optimizer: torch.optim.Optimizer, scheduler: Any, scale: LossScale | None) -> dict[str, Any]:
    """What is no tensor and the same on every rank."""
    groups = [
        {key: value for key, value in group.items() if key not in _OF_THE_MACHINE}
        for group in optimizer.param_groups
    ]
    return {
        "format": _FORMAT,
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "scheduler": scheduler.state_dict(),
        "scaler": None if scale is None else scale.state_dict(),
    }


def take_state(
    optimizer: torch.optim.Optimizer,
    holdings: Iterable[Holding],
    host: HostMemory,
    common: dict[str, Any],
) -> EngineState:
    """Copy what these holdings hold to the host."""
    state = EngineState(common)
    for holding in holdings:
        fields: dict[str, Any] = {WEIGHT: holding.tensor.detach(), **optimizer.state.get(holding.tensor, {})}
        for name, value in fields.items():
            if not isinstance(value, torch.Tensor) or (value.dim() == 0 and holding.tensor.dim() > 0):
                for span in holding.spans:
                    state.scalars.setdefault(span.name, {})[name] = _to_json(value, name, optimizer)
            elif value.shape == holding.tensor.shape:
                for span in holding.spans:
                    piece = value.reshape(-1)[span.at : span.at + span.count]
                    kept = host.hold(key_of(span.name, name, span.start, span.count), piece)
                    state.slices.append(Slice(span.name, name, span.start, span.shape, kept))
            elif len(holding.spans) == 1 and holding.spans[0].shape == tuple(holding.tensor.shape):
                span = holding.spans[0]
                kept = host.hold(key_of(span.name, name, 0, value.numel()), value)
                state.slices.append(Slice(span.name, name, 0, tuple(value.shape), kept))
            else:
                raise CheckpointError(
                    f"optimizer `{type(optimizer).__name__}` keeps `{name}` in another shape than its "
                    "parameters', which ZeRO cannot cut back into them. Set `zero_stage=null`, or take "
                    "another optimizer."
                )
    return state


def _to_json(value: Any, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(
        f"optimizer `{type(optimizer).__name__}` keeps `{name}` as {type(value).__name__}, which a "
        'checkpoint cannot hold (tensors and numbers only). Set `save_strategy="no"`, or take another one.'
    )


class StateReader:
    """The engine state of a checkpoint: any slice of any parameter, from whichever files hold it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if not (directory / ENGINE).is_file():
            raise CheckpointError(
                f"`{directory}` has no `{ENGINE}`: this checkpoint is of an earlier layout, which this "
                "version of rayrm does not resume. Resume it with the version that wrote it, or start a new "
                "`output_dir` with `model.name` set to the checkpoint."
            )
        self.common: dict[str, Any] = json.loads((directory / ENGINE).read_text())
        if self.common["format"] != _FORMAT:
            raise CheckpointError(
                f"`{directory / ENGINE}` has format {self.common['format']}, this rayrm reads {_FORMAT}. "
                "Resume with the version that wrote it."
            )
        self._files: dict[Path, Any] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        for listing in sorted(directory.glob("rank-*.json")):
            part = json.loads(listing.read_text())
            file = listing.with_suffix(".safetensors")
            for key, name, kind, offset, shape in part["slices"]:
                self._pieces.setdefault((name, kind), []).append((offset, file, key))
                self._shapes.setdefault(name, {})[kind] = tuple(shape)
            for name, scalars in part["scalars"].items():
                self.scalars.setdefault(name, {}).update(scalars)

    def check(self, optimizer: torch.optim.Optimizer, stepped: Iterable[str]) -> None:
        """Refuse the state of another optimizer or of other parameters than those that it steps."""
        wrote, mine = self.common["optimizer"], type(optimizer).__name__
        if wrote != mine or len(self.common["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                f"`{self._directory}` holds the state of optimizer `{wrote}` with "
                f"{len(self.common['groups'])} group(s), this run's is `{mine}` with "
                f"{len(optimizer.param_groups)}. Resume with the optimizer that wrote it (`optim`)."
            )
        different = sorted(set(stepped) ^ set(self._shapes))
        if different:
            raise CheckpointError(
                f"`{self._directory}` does not hold the parameters that this run trains: "
                f"{', '.join(different[:3])} and others differ ({len(different)}). Resume with the model and "
                "adapter that wrote it."
            )

    def fields(self, name: str) -> dict[str, tuple[int, ...]]:
        """The tensors kept of a parameter beside its weight, with their shapes."""
        return {kind: shape for kind, shape in self._shapes[name].items() if kind != WEIGHT}

    def read(self, name: str, kind: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements `start` to `start + count` of the flat field; the whole of it where `count` is None."""
        whole = math.prod(self._shapes[name][kind])
        stop = whole if count is None else start + count
        found: list[torch.Tensor] = []
        reached = start
        for offset, file, key in sorted(self._pieces[name, kind], key=lambda piece: piece[0]):
            stored = self._open(file).get_slice(key)
            end = offset + stored.get_shape()[0]
            if offset <= reached < end and reached < stop:
                found.append(stored[reached - offset : min(end, stop) - offset])
                reached = min(end, stop)
        if reached < stop:
            raise CheckpointError(
                f"`{self._directory}` lacks elements {reached} to {stop} of `{kind}` of `{name}`. Delete the "
                "checkpoint to resume from the one before."
            )
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(str(file), framework="pt")
        return self._files[file]


def restore_state(optimizer: torch.optim.Optimizer, holdings: Iterable[Holding], reader: StateReader) -> None:
    """Fill these holdings, their optimizer state and the optimizer's settings from `reader`."""
    for group, stored in zip(optimizer.param_groups, reader.common["groups"], strict=True):
        for key, value in stored.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for holding in holdings:
        _check_shapes(holding, reader)
        with torch.no_grad():
            for span in holding.spans:
                _put(reader.read(span.name, WEIGHT, span.start, span.count), span, holding.tensor)
        state = _tensors(holding, reader)
        group = optimizer.param_groups[holding.group]
        on_device = bool(group.get("fused") or group.get("capturable"))
        state.update(_scalars(holding, reader, holding.tensor.device if on_device else torch.device("cpu")))
        optimizer.state.pop(holding.tensor, None)
        if state:
            optimizer.state[holding.tensor] = state


def _put(values: torch.Tensor, span: Span, target: torch.Tensor) -> None:
    if span.count == target.numel():
        target.copy_(values.view(target.shape))  # whatever its strides
    else:
        target.view(-1)[span.at : span.at + span.count].copy_(values)


def _check_shapes(holding: Holding, reader: StateReader) -> None:
    for span in holding.spans:
        stored = reader._shapes[span.name][WEIGHT]
        if stored != span.shape:
            raise CheckpointError(
                f"parameter `{span.name}` has shape {list(stored)} in the checkpoint and {list(span.shape)} "
                "in this run. Resume with the model and adapter that wrote it."
            )


def _tensors(holding: Holding, reader: StateReader) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for span in holding.spans:
        for kind, shape in reader.fields(span.name).items():
            if shape != span.shape:
                if span.shape != tuple(holding.tensor.shape):
                    raise CheckpointError(
                        f"`{kind}` of `{span.name}` has shape {list(shape)}, which a ZeRO partition cannot "
                        "hold. Resume with `zero_stage=null`."
                    )
                state[kind] = reader.read(span.name, kind).view(shape).to(holding.tensor.device)
                continue
            values = reader.read(span.name, kind, span.start, span.count)
            if kind not in state:
                state[kind] = torch.zeros_like(holding.tensor, dtype=values.dtype, requires_grad=False)
            _put(values, span, state[kind])
    return state


def _scalars(holding: Holding, reader: StateReader, device: torch.device) -> dict[str, Any]:
    """One number for the whole holding: of a partition, the furthest of its parameters' step counters."""
    found: dict[str, dict[str, Any]] = {}
    for span in holding.spans:
        for name, stored in reader.scalars.get(span.name, {}).items():
            ahead = name not in found or (
                stored["value"] is not None
                and (found[name]["value"] is None or stored["value"] > found[name]["value"])
            )
            if ahead:
                found[name] = stored
    return {
        name: torch.tensor(stored["value"], dtype=getattr(torch, stored["dtype"]), device=device)
        if "dtype" in stored
        else stored["value"]
        for name, stored in found.items()
    }
