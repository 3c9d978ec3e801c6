"""What DeepSpeed's ranks hold of each parameter, stage by stage, and the way back.

Reads DeepSpeed 0.19's own mapping: `_hp_mapping` of a parameter (stages 1 and 2), `grad_position` and the
flat sub-groups (stage 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rayrm.train.engine_state import WEIGHT, Holding, Span, StateReader


def inner_optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """torch's optimizer, which steps over parameters (stage 0) or flat partitions."""
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return optimizer


def scale_by(engine: Any, stage: int, scale: float | None) -> None:
    """Let DeepSpeed multiply losses by `scale`, and divide gradients by it before it measures and clips them.

    None: it leaves both as they are. At stage 0 they are the caller's in either case. The scalers that
    DeepSpeed itself makes beside autocast divide after clipping; and once a run in fp16 was in this process,
    it makes them in whatever precision.
    """
    engine.torch_autocast_z0_gradscaler = None
    if stage > 0:
        engine.optimizer.torch_autocast_gradscaler = None
        if scale is not None:
            engine.optimizer.override_loss_scale(scale)


def share_weights(zero: Any) -> None:
    """Let stage 3 step over the model's own float32 weights rather than over a copy of this rank's part.

    DeepSpeed 0.19 means to (`_create_fp32_partitions`), but compares a device with its name.
    """
    for master, weights in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
    ):
        if weights is None or (master.dtype, master.device) != (weights.dtype, weights.device):
            continue
        if master.shape == weights.shape:
            master.data = weights.data


def partition_holdings(
    zero: Any, stage: int, names: dict[torch.Tensor, str], *, changes: bool
) -> Iterable[Holding]:
    """This rank's partitions under stage 1, 2 or 3; `zero` is DeepSpeed's optimizer.

    One that lies on a disk is in memory while it is the current one, then written back where it `changes`.
    """
    return _sub_groups(zero, names, changes) if stage == 3 else _flat_groups(zero, names)


def forget_state_on_disk(zero: Any) -> None:
    """Let other state take the place of what the optimizer has on a disk, of which DeepSpeed keeps a list."""
    if getattr(zero, "swap_optimizer", False):
        zero.optimizer_swapper.purge_state()


def _flat_groups(zero: Any, names: dict[torch.Tensor, str]) -> list[Holding]:
    holdings = []
    for index, partition in enumerate(zero.single_partition_of_fp32_groups):
        spans = []
        for parameter in zero.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # lies in other ranks' partitions
            there, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            spans.append(Span(names[parameter], tuple(parameter.shape), there.start, here.start, here.numel))
        holdings.append(Holding(partition, spans, min(index, len(zero.optimizer.param_groups) - 1)))
    return holdings


@contextlib.contextmanager
def _in_memory(zero: Any, index: int, changes: bool) -> Iterator[None]:
    """Inside, a sub-group of stage 3 and its optimizer state are in memory, wherever they lie."""
    if not zero._swappable_optimizer_subgroup(index):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if changes:
            zero._optimizer_states_and_gradient_swap_out(index)
        else:
            zero._release_swap_buffers(index)


def _sub_groups(zero: Any, names: dict[torch.Tensor, str], changes: bool) -> Iterator[Holding]:
    for index, partition in enumerate(zero.fp32_partitioned_groups_flat):
        spans = []
        for parameter in zero.fp16_groups[index]:
            _, at, width = zero.grad_position[zero.get_param_id(parameter)]
            start = width * zero._get_param_partition_rank(parameter)
            # The last ranks' parts are padded to equal width.
            count = min(width, parameter.ds_numel - start)
            if count > 0:
                spans.append(Span(names[parameter], tuple(parameter.ds_shape), start, at, count))
        with _in_memory(zero, index, changes):
            yield Holding(partition, spans, zero.sub_group_to_group_id[index])


def spread(zero: Any, stage: int, names: dict[torch.Tensor, str], reader: StateReader) -> None:
    """Give the model the weights that partitions were just filled with; all ranks call it."""
    if stage < 3:
        # Every rank holds every weight: read again here rather than gathered from the ranks.
        with torch.no_grad():
            for group in zero.bit16_groups:
                for parameter in group:
                    parameter.copy_(reader.read(names[parameter], WEIGHT).view_as(parameter))
        return
    zero.checkpoint_event_prologue()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        with _in_memory(zero, index, changes=False):
            zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()
