"""`DeepSpeedEngine`: ZeRO stages 0-3 with torch's optimizer as DeepSpeed's client optimizer.

Only this file imports deepspeed. DeepSpeed averages gradients over ranks, as TorchEngine does; accumulation
is left to the caller (`managed_gradient_accumulation` off), so a step may have any number of micro-batches,
as long as every rank has as many. Mixed precision is autocast over float32 parameters; gradients are float32.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from rayrm.deepspeed_sections import offloads_optimizer, quantized_on_cpu
from rayrm.errors import ConfigError
from rayrm.model.cost import head_sizes
from rayrm.model.forward import DeviceBatch, PackedScorer
from rayrm.model.layout import unwrapped
from rayrm.model.sequence import Attend, Exchange
from rayrm.train.build import on_first_rank
from rayrm.train.engine import AroundUpdate
from rayrm.train.engine_state import (
    EngineState,
    Holding,
    StateReader,
    common_state,
    restore_state,
    take_state,
    whole_holdings,
)
from rayrm.train.host_memory import HostMemory
from rayrm.train.loss_scale import LossScale
from rayrm.train.nvme import buffers_told
from rayrm.train.zero_config import refusals_named, with_sizes
from rayrm.train.zero_state import (
    forget_state_on_disk,
    inner_optimizer,
    partition_holdings,
    scale_by,
    share_weights,
    spread,
)

logger = logging.getLogger("rayrm.train")
# What DeepSpeed's own profiler and monitor count by.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def import_deepspeed(device: torch.device) -> Any:
    """The package, told what it reads when it is imported and first used."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asserts that a launcher set it
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # A shared-memory reduction that DeepSpeed would compile on the spot, with a compiler; gloo does.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def async_io_builder(device: torch.device) -> Any:
    """What loads DeepSpeed's reading and writing of disks, and knows whether this machine can."""
    import_deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def gathered(
    parameters: list[torch.nn.Parameter], *, changed: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Whole, inside, are these parameters of a sharded model; all ranks enter.

    `changed`: they are kept as rank 0 leaves them; otherwise none changes them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    around: contextlib.AbstractContextManager[None] = GatheredParameters(
        parameters, modifier_rank=0 if changed else None
    )
    return around


def exchange_in(group: dist.ProcessGroup, model_config: Any, device: torch.device) -> Exchange:
    """Attention over the tokens of a group's ranks, by DeepSpeed's Ulysses, for either engine.

    `UlyssesSPAttentionHF` is called for each layer as it is, with our attention as its own. It is not
    registered with transformers: registered there it would take the place of every model's "sdpa" and drop
    masks.
    """
    import_deepspeed(device)
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    comm.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    sizes = head_sizes(model_config)
    assert sizes is not None
    heads = model_config.num_attention_heads

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: None, *, attend: Attend, position_ids: Any
    ) -> tuple[torch.Tensor, None]:
        return attend(query, key, value).transpose(1, 2), None

    ulysses = UlyssesSPAttentionHF(
        attention,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=sizes[0],
        kv_head_count=getattr(model_config, "num_key_value_heads", None) or heads,
        num_hidden_layers=model_config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def exchange(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        # It writes to the layer that calls; here to itself, so that the model stays as it is.
        attended: torch.Tensor
        attended, _ = ulysses(ulysses, query, key, value, None, attend=attend, position_ids=positions)
        return attended

    return exchange


@contextlib.contextmanager
def keeping_types() -> Iterator[None]:
    """Weights that DeepSpeed parts within the block keep their type.

    Version 0.19.8 reads "as told, or else by what the machine has" the other way round, and rounds float32
    weights on a disk to bfloat16 where a CPU has no float16.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    choose = Init._set_dtype

    def as_told(parts: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        choose(parts, ds_config, dtype)
        if dtype is not None:
            parts.dtype = dtype

    Init._set_dtype = as_told
    try:
        yield
    finally:
        Init._set_dtype = choose


class DeepSpeedEngine:
    """An `Engine` on DeepSpeed. `torch.distributed` must be initialised (also for one rank)."""

    def __init__(
        self,
        module: PackedScorer,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        device: torch.device,
        world_size: int,
        max_grad_norm: float,
        settings: dict[str, Any],
        skips_nonfinite: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(device)
        refused = quantized_on_cpu(settings) if device.type == "cpu" else None
        if refused is not None:
            raise ConfigError(refused)
        self.device = device
        self.world_size = world_size
        self.module = module
        is_fp16 = settings.get("torch_autocast", {}).get("dtype") == "float16"
        self._scale = LossScale() if is_fp16 else None
        self._stage = int(settings["zero_optimization"]["stage"])
        if self._stage == 3:
            hidden_size = unwrapped(module.model).config.get_text_config().hidden_size
            sized = with_sizes(settings["zero_optimization"], module, hidden_size)
            settings = {**settings, "zero_optimization": sized}
        self._max_grad_norm = max_grad_norm
        self._skips_nonfinite = skips_nonfinite
        self.optimizer: Any = optimizer
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._norm = torch.zeros((), device=device)
        self.scheduler = scheduler
        self.around_update: AroundUpdate = contextlib.nullcontext
        if self._stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        if offloads_optimizer(settings) and on_first_rank():
            logger.info("the optimizer's state is offloaded, and torch's own steps over it on the CPU")
        with buffers_told(), keeping_types(), refusals_named():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                lr_scheduler=scheduler,
                config=settings,
                dist_init_required=False,
            )
        if self._stage == 3:
            share_weights(self._engine.optimizer)
        self._tell_scale()

    def _tell_scale(self) -> None:
        scale_by(self._engine, self._stage, None if self._scale is None else self._scale.scale)

    @property
    def scales_loss(self) -> bool:
        return self._scale is not None and not self._scale.is_spent

    def _clip(self, *_: Any) -> None:
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        if self._scale is not None:
            torch._foreach_mul_(gradients, 1 / self._scale.scale)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._skips_nonfinite or self._scale is not None:
            # As the optimizers of the other stages, which leave such a step out whatever was asked for:
            # DeepSpeed reads `overflow`, and then leaves the schedule alone.
            self.optimizer.overflow = not bool(torch.isfinite(self._norm))
            if self.optimizer.overflow:
                for parameter in self._trainable:
                    parameter.grad = None
                return
        if self._max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self._max_grad_norm, self._norm)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def scores(self, batch: DeviceBatch) -> torch.Tensor:
        scores: torch.Tensor = self._engine(batch)
        if self._stage == 3 and not torch.is_grad_enabled():
            # DeepSpeed has begun to fetch what a backward pass would need, and none comes: weights on their
            # way can be neither saved nor parted.
            self._engine.optimizer.empty_partition_cache()
        return scores

    def backward(self, loss: torch.Tensor) -> None:
        if self._stage == 0 and self._scale is not None:
            loss = loss * self._scale.scale
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> torch.Tensor:
        # The optimizer itself is called several times a step: for each group of parameters, or part of one.
        with self.around_update():
            self._engine.step()
        if self._stage > 0:
            self._norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        if self._scale is not None:
            self._scale.update(float(self._norm))
            self._tell_scale()
        return self._norm.detach().float()

    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def model_state(self, *, frozen: bool = True) -> dict[str, torch.Tensor] | None:
        state = self._module_state(frozen=frozen)
        if state is None:
            return None
        # Without what is beside the model.
        return {
            name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")
        }

    def _module_state(self, *, frozen: bool) -> dict[str, torch.Tensor] | None:
        if self._stage < 3:
            return None
        # Gathers on every rank's behalf; rank 0 gets the result.
        state: dict[str, torch.Tensor] | None = self._engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=not frozen
        )
        return state

    def release(self) -> None:
        state = self._module_state(frozen=True)
        self._engine.destroy()
        for parameter in self._trainable:
            parameter.grad = None  # of a step that raised
        if state is None:
            return
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                # Partitioned parameters are empty, and marked as DeepSpeed's, which would gather them again.
                parameter.data = state[name].to(self.device)
                for mark in [key for key in vars(parameter) if key.startswith("ds_")]:
                    delattr(parameter, mark)

    def _holdings(self, *, changes: bool = False) -> Iterable[Holding]:
        if self._stage == 0:
            return whole_holdings(self.module, inner_optimizer(self._engine, 0))
        return partition_holdings(self._engine.optimizer, self._stage, self._names(), changes=changes)

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.module.named_parameters()}

    def state(self, host: HostMemory) -> EngineState:
        optimizer = inner_optimizer(self._engine, self._stage)
        common = common_state(optimizer, self.scheduler, self._scale)
        common["counters"] = {name: getattr(self._engine, name) for name in _COUNTERS}
        mine = self._holdings() if self._stage > 0 or on_first_rank() else []
        return take_state(optimizer, mine, host, common)

    def load(self, directory: Path) -> None:
        reader = StateReader(directory)
        optimizer = inner_optimizer(self._engine, self._stage)
        reader.check(optimizer, [n for n, p in self.module.named_parameters() if p.requires_grad])
        forget_state_on_disk(self._engine.optimizer)
        restore_state(optimizer, self._holdings(changes=True), reader)
        if self._stage > 0:
            spread(self._engine.optimizer, self._stage, self._names(), reader)
        self.scheduler.load_state_dict(reader.common["scheduler"])
        for name, value in reader.common.get("counters", {}).items():
            setattr(self._engine, name, value)
        if self._scale is not None and reader.common["scaler"]:
            self._scale.load_state_dict(reader.common["scaler"])
            self._tell_scale()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The process group that DeepSpeed needs: the one there is, or one of this process, closed at the end.

    Closed by DeepSpeed, which keeps groups of its own: the next run in this process makes new ones.
    """
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    launched = "LOCAL_RANK" in os.environ
    try:
        yield
    finally:
        if not launched:
            # Left behind, it would tell accelerate that a launcher runs many processes.
            os.environ.pop("LOCAL_RANK", None)
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()
        else:
            dist.destroy_process_group()
