"""Which rank this process is, and what ranks tell each other from host to host."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of how many this process is, and its device."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def here(cls, *, use_cpu: bool) -> Rank:
        """Read off the process group (one rank where there is none)."""
        ready = dist.is_initialized()
        cuda = torch.cuda.is_available() and not use_cpu
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(
            dist.get_rank() if ready else 0,
            dist.get_world_size() if ready else 1,
            torch.device("cuda", local if local < torch.cuda.device_count() else 0)
            if cuda
            else torch.device("cpu"),
        )

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


class Hosts:
    """Small things between ranks, by gloo on the CPU: no device is waited for.

    Every rank makes one, and calls what it offers, in the same order.
    """

    def __init__(self) -> None:
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        apart = self._several and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo") if apart else None

    def from_first(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if not self._several:
            return value
        told = torch.tensor([value], dtype=torch.int32)
        dist.broadcast(told, 0, group=self._group)
        return int(told[0])

    def most(self, value: int) -> int:
        """The greatest of the ranks' values."""
        if not self._several:
            return value
        told = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return int(told[0])

    def joined(self, names: list[str]) -> list[str]:
        """The names of all ranks, rank after rank."""
        if not self._several:
            return names
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, names, group=self._group)
        return [name for part in parts for name in part]
