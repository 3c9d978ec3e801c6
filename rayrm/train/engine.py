"""What turns losses into updates. `TorchEngine` is plain PyTorch; `DeepSpeedEngine` (zero.py) is ZeRO.

The contract: every micro-batch goes through `engine.scores`, never around it; the caller owns the
accumulation boundary and calls `step` once per optimizer step. The loss that `backward` is given already
holds the factor (world size / the step's global row count), since both engines average gradients over ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from rayrm.model.forward import DeviceBatch, PackedScorer
from rayrm.model.layout import unwrapped
from rayrm.train.engine_state import (
    EngineState,
    StateReader,
    common_state,
    restore_state,
    take_state,
    whole_holdings,
)
from rayrm.train.host_memory import HostMemory
from rayrm.train.loss_scale import LossScale
from rayrm.train.precision import Precision, in_precision
from rayrm.train.row_gradient import RowGradient

AroundUpdate = Callable[[], contextlib.AbstractContextManager[None]]
_BUCKET_ELEMENTS = 16_000_000


class Engine(Protocol):
    """One rank's hold on the model, its gradients and its optimizer."""

    device: torch.device
    world_size: int
    module: PackedScorer
    optimizer: torch.optim.Optimizer
    """As it was made; ZeRO steps by it."""
    scheduler: torch.optim.lr_scheduler.LRScheduler
    around_update: AroundUpdate
    """Entered once a step, around the update. In PyTorch gradients are clipped before it and cleared after
    it; DeepSpeed does both within."""

    @property
    def scales_loss(self) -> bool:
        """Whether a norm that is not finite is a matter of the loss scale (fp16), which is then lowered."""
        ...

    def train(self, mode: bool) -> None: ...

    def scores(self, batch: DeviceBatch) -> torch.Tensor:
        """Scores `[N]`, float32."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients."""
        ...

    def step(self) -> torch.Tensor:
        """Average gradients over ranks, clip, update; the global gradient norm before clipping, a scalar.

        One made to skip, and any in fp16, leaves everything but the gradients as it is where that norm is not
        finite.
        """
        ...

    def learning_rate(self) -> float: ...

    def model_state(self, *, frozen: bool = True) -> dict[str, torch.Tensor] | None:
        """The whole model's weights, on rank 0 (None elsewhere, or where the module itself holds them).

        `frozen=False` leaves out those that are not trained.
        """
        ...

    def release(self) -> None:
        """End training, at any step: one rank's module holds whole weights, no gradients and no hooks."""
        ...

    def state(self, host: HostMemory) -> EngineState:
        """Copy this rank's share of everything that `load` needs into `host`."""
        ...

    def load(self, directory: Path) -> None:
        """Go on from what any number of ranks of any engine wrote; exactly, where they were as many."""
        ...


class TorchEngine:
    """PyTorch: gradients accumulated in the parameters' dtype, averaged over ranks by all-reduce."""

    def __init__(
        self,
        module: PackedScorer,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        device: torch.device,
        world_size: int,
        max_grad_norm: float,
        precision: Precision = "fp32",
        skips_nonfinite: bool = False,
    ) -> None:
        self.module = module
        self.device = device
        self.world_size = world_size
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.around_update: AroundUpdate = contextlib.nullcontext
        self._max_grad_norm = max_grad_norm
        self._precision = precision
        self._scale = LossScale() if precision == "fp16" else None
        self._skips_nonfinite = skips_nonfinite
        self._embedding = RowGradient.of(unwrapped(module.model), device)
        apart = None if self._embedding is None else self._embedding.weight
        self._dense = [p for p in module.parameters() if p.requires_grad and p is not apart]
        # What ranks tell each other between hosts, so that no device is waited for; None: all they say.
        between_devices = world_size > 1 and dist.get_backend() != "gloo"
        self._hosts = dist.new_group(backend="gloo") if between_devices else None

    @property
    def scales_loss(self) -> bool:
        return self._scale is not None and not self._scale.is_spent

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def scores(self, batch: DeviceBatch) -> torch.Tensor:
        return in_precision(self.module, batch, self._precision)

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss if self._scale is None else loss * self._scale.scale)

    def step(self) -> torch.Tensor:
        gradients = self._gradients()
        if self._scale is not None:
            torch._foreach_mul_(gradients, 1 / self._scale.scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._is_left_out(norm):
            self._clear_gradients()
            return norm
        if self._max_grad_norm > 0:
            # As torch.nn.utils.clip_grads_with_norm_, which takes parameters.
            torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if self._embedding is not None:
            self._embedding.give(gradients[-1])
        with self.around_update():
            self.optimizer.step()
        self.scheduler.step()
        if self._embedding is not None:
            self._embedding.clear()
        self._clear_gradients()
        return norm

    def _is_left_out(self, norm: torch.Tensor) -> bool:
        """Whether there is to be no update; reads the norm where that can be."""
        if self._scale is not None:
            return not self._scale.update(float(norm))
        return self._skips_nonfinite and not bool(torch.isfinite(norm))

    def _clear_gradients(self) -> None:
        # All of the module's: an optimizer need not hold every parameter that has one.
        self.module.zero_grad(set_to_none=True)

    def _gradients(self) -> list[torch.Tensor]:
        """This step's gradients, averaged over ranks; the embedding's touched rows come last."""
        if self.world_size > 1:
            self._agree_who_has_gradients()
        gradients = [p.grad for p in self._dense if p.grad is not None]
        if self._embedding is not None:
            gradients.append(self._embedding.take(self.world_size))
        if self.world_size > 1:
            _average_in_buckets(gradients, self.world_size)
        return gradients

    def _agree_who_has_gradients(self) -> None:
        """A parameter that another rank has a gradient of gets zeros here; one that none has stays without.

        As on one rank: the optimizer leaves it alone, where zeros would decay it and use up its moments.
        """
        anywhere = torch.tensor([p.grad is not None for p in self._dense], dtype=torch.uint8)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self._hosts)
        for parameter, used in zip(self._dense, anywhere.tolist(), strict=True):
            if used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def model_state(self, *, frozen: bool = True) -> dict[str, torch.Tensor] | None:
        return None

    def release(self) -> None:
        if self._embedding is not None:
            self._embedding.close()
        # Of a step that raised: an optimizer of the model's owner would take them for its own.
        self._clear_gradients()

    def _is_first(self) -> bool:
        return self.world_size == 1 or dist.get_rank() == 0

    def state(self, host: HostMemory) -> EngineState:
        common = common_state(self.optimizer, self.scheduler, self._scale)
        holdings = whole_holdings(self.module, self.optimizer) if self._is_first() else []
        return take_state(self.optimizer, holdings, host, common)

    def load(self, directory: Path) -> None:
        reader = StateReader(directory)
        holdings = whole_holdings(self.module, self.optimizer)
        reader.check(self.optimizer, [span.name for holding in holdings for span in holding.spans])
        restore_state(self.optimizer, holdings, reader)
        self.scheduler.load_state_dict(reader.common["scheduler"])
        if self._scale is not None and reader.common["scaler"]:
            self._scale.load_state_dict(reader.common["scaler"])


def _average_in_buckets(gradients: list[torch.Tensor], world_size: int) -> None:
    """All-reduce in flat buckets, in place."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= _BUCKET_ELEMENTS:
            _average(bucket, world_size)
            bucket, size = [], 0
    if bucket:
        _average(bucket, world_size)


def _average(gradients: list[torch.Tensor], world_size: int) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, piece in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))
