"""What DeepSpeed's ranks hold of each parameter, stage by stage, and the way back.

Reads DeepSpeed 0.19's own mapping: `_hp_mapping` of a parameter (stages 1 and 2), `grad_position` and the
flat sub-groups (stage 3).
"""

from __future__ import annotations

from typing import Any

import torch

from rayrm.train.engine_state import WEIGHT, Holding, Span, StateReader


def inner_optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """torch's optimizer, which steps over parameters (stage 0) or flat partitions."""
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return optimizer


def loss_scaler(engine: Any, stage: int) -> Any:
    return engine.torch_autocast_z0_gradscaler if stage == 0 else engine.optimizer.torch_autocast_gradscaler


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


def partition_holdings(zero: Any, stage: int, names: dict[torch.Tensor, str]) -> list[Holding]:
    """This rank's partitions under stage 1, 2 or 3; `zero` is DeepSpeed's optimizer."""
    return _sub_groups(zero, names) if stage == 3 else _flat_groups(zero, names)


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


def _sub_groups(zero: Any, names: dict[torch.Tensor, str]) -> list[Holding]:
    holdings = []
    for index, partition in enumerate(zero.fp32_partitioned_groups_flat):
        spans = []
        for parameter in zero.fp16_groups[index]:
            _, at, width = zero.grad_position[zero.get_param_id(parameter)]
            start = width * zero._get_param_partition_rank(parameter)
            # The last ranks' parts are padded to equal width.
            count = min(width, parameter.ds_numel - start)
            if count > 0:
                spans.append(Span(names[parameter], tuple(parameter.ds_shape), start, at, count))
        holdings.append(Holding(partition, spans, zero.sub_group_to_group_id[index]))
    return holdings


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
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()
