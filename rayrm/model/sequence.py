"""A micro-batch whose tokens several ranks compute together: each has one part of them, neighbouring tokens.

Everything but attention is of a token alone. For attention the ranks exchange: each then has all tokens of
its own share of the heads, attends as one rank would, and gives the others their tokens back (Ulysses,
https://arxiv.org/abs/2309.14509). What a rank holds falls with the number of ranks, and no key is computed
twice. The exchange is handed in: training has DeepSpeed's.

Each score is read by the rank that has its token, and all ranks of the group then know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rayrm.model.attention import Attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries `[1, H, T, D]`, keys and values `[1, K, T, D]` -> `[1, H, T, D]`."""


class Exchange(Protocol):
    """Attention over the tokens of all ranks of a group; every rank calls it at the same places."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """`query` `[1, H, T/P, D]`, `key`, `value` `[1, K, T/P, D]` of this rank's tokens -> `[1, T/P, H D]`.

        `attend` is called with all T tokens of this rank's heads. `positions` `[1, T/P]`.
        """
        ...


@dataclass(frozen=True, slots=True)
class SequencePart:
    """This rank's place among the `size` ranks of `group` that compute each micro-batch together."""

    place: int
    size: int
    group: dist.ProcessGroup
    exchange: Exchange

    @property
    def counts(self) -> bool:
        """Whether this rank stands for the group where what all its ranks know is to be counted once."""
        return self.place == 0

    def summed(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[N]`, zero where another rank has the token, added up over the group."""
        total: torch.Tensor = _Summed.apply(scores, self.group)  # type: ignore[no-untyped-call]
        return total


class _Summed(torch.autograd.Function):
    """A sum over ranks that all go on to compute the same loss.

    So the gradient of each rank's own part is that of the sum, once: added up over the group's ranks it is
    the gradient of one loss, and not of as many as there are ranks.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = scores.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


@dataclass(frozen=True, slots=True)
class AttentionInParts:
    """The attention `whole` of a batch of which this rank has the tokens at `positions` `[1, T/P]`."""

    whole: Attention
    part: SequencePart
    positions: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`query` `[1, H, T/P, D]`, `key` and `value` `[1, K, T/P, D]` -> `[1, H, T/P, D]`."""
        attend = partial(self.whole.attend, scaling=scaling, softcap=softcap)
        attended = self.part.exchange(query, key, value, self.positions, attend)
        return attended.view(*attended.shape[:2], query.shape[1], query.shape[3]).transpose(1, 2)
