"""The model's files where ranks hold parts of it (ZeRO-3): each rank writes some of the weights.

    model-0000<r>-of-0000<N>.safetensors   rank r - 1's weights, as transformers names its shards
    model.safetensors.index.json           which file has which; written by rank 0, when all are there

A weight is whole on every rank for a moment, one at a time, so that no rank ever holds the model. One rank,
by size, copies it to the host. Of an adapter rank 0 keeps all that is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import gathers_model, resolved_stage
from rayrm.errors import CheckpointError
from rayrm.model.adapters import is_adapted
from rayrm.model.attribute_head import AttributeWeights
from rayrm.model.layout import unwrapped
from rayrm.train.checkpoint import is_of_the_disk
from rayrm.train.export import ASIDE, INDEX, ModelExport, move_saved, why_not_saved
from rayrm.train.host_memory import HostMemory
from rayrm.train.rank import Hosts


def shards_files(config: RewardConfig, model: torch.nn.Module, num_ranks: int) -> bool:
    """Whether each rank writes its own file of weights; asked before an engine takes the model."""
    if num_ranks == 1 or resolved_stage(config) != 3 or gathers_model(config):
        return False
    return not is_adapted(model) and not _joins_weights(unwrapped(model))


def _joins_weights(model: PreTrainedModel) -> bool:
    """Whether a weight in the model's files is made of several of the model's, of any ranks."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(one, WeightConverter) and len(one.target_patterns) > 1 for one in conversions)


class ShardExport:
    """One rank's file of weights; on rank 0 also what comes with them. Made on every rank."""

    def __init__(self, export: ModelExport, rank: int, num_ranks: int) -> None:
        self._export = export
        self._rank, self._num_ranks = rank, num_ranks
        self._owners: dict[str, int] = {}
        self._first: dict[str, str] = {}
        """Tied weights are one tensor, which transformers saves once: the first name of each."""
        names: dict[int, str] = {}
        held = [0] * num_ranks
        weights = export.weights()
        for name in sorted(weights, key=lambda name: (-weights[name].numel(), name)):
            first = self._first[name] = names.setdefault(id(weights[name]), name)
            if first == name:
                self._owners[name] = held.index(min(held))
                held[self._owners[name]] += weights[name].nbytes
            else:
                self._owners[name] = self._owners[first]
        self._num_bytes = sum(held)

    def take(
        self,
        model: torch.nn.Module,
        host: HostMemory,
        attributes: AttributeWeights | None = None,
        place: Path | None = None,
    ) -> Callable[[Path], None]:
        """Copy this rank's share of the weights; returns what writes its file. Every rank calls it.

        `place`: as of `save_model`.
        """
        mine: dict[str, torch.Tensor] = {}
        for name, weight in whole_one_by_one(model, self._owners):
            if self._owners[name] == self._rank:
                mine[name] = host.hold(f"shard {self._first[name]}", weight).view(weight.shape)
                host.settle()  # before the weight is let go

        def write(directory: Path) -> None:
            if self._rank > 0:
                self._export.save_weights(directory / self._file(""), mine)
                return
            self._export.save(directory, mine, attributes, place)
            (directory / INDEX).unlink(missing_ok=True)
            files = sorted(directory.glob("model*.safetensors"))  # above 50 GB transformers makes several
            for number, file in enumerate(files):
                file.rename(directory / self._file(f"-{number}" if number else ""))

        return write

    def join(self, directory: Path) -> Path:
        """Write the index of the files of all ranks."""
        where: dict[str, str] = {}
        size = 0
        for file in sorted(directory.glob(f"model-*-of-{self._num_ranks:05d}*.safetensors")):
            with safe_open(str(file), framework="pt") as stored:
                where |= dict.fromkeys(stored.keys(), file.name)
            size += file.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return directory / INDEX

    def _file(self, more: str) -> str:
        return f"model-{self._rank + 1:05d}-of-{self._num_ranks:05d}{more}.safetensors"

    def save_trained(
        self,
        model: torch.nn.Module,
        output_dir: Path,
        hosts: Hosts,
        attributes: AttributeWeights | None = None,
    ) -> None:
        """Save the model at the end of its run; all ranks call it.

        Raises:
            CheckpointError: it could not be written, by whichever rank. Nothing of it stays.
        """
        aside, mine = output_dir / ASIDE, output_dir / ASIDE / f"of-{self._rank}"
        write = self.take(model, HostMemory(), attributes, output_dir)

        def begin() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()

        def write_mine() -> None:
            mine.mkdir()
            write(mine)
            for file in mine.iterdir():
                file.rename(aside / file.name)
            mine.rmdir()

        def end() -> None:
            self.join(aside)
            move_saved(aside, output_dir)

        for act, by_all in ((begin, False), (write_mine, True), (end, False)):
            problems = []
            try:
                if by_all or self._rank == 0:
                    act()
            except Exception as error:
                if not is_of_the_disk(error):
                    raise
                problems.append(why_not_saved(error, output_dir, self._num_bytes))
            if told := hosts.joined(problems):
                if self._rank == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                raise CheckpointError(told[0])


def whole_one_by_one(model: torch.nn.Module, names: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of the named weights and buffers, whole while it is looked at; all ranks go through them."""
    from rayrm.train.zero import gathered

    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name in names:
        if name in buffers:
            yield name, buffers[name]
            continue
        with gathered([parameters[name]]):
            yield name, parameters[name].detach()
