"""Forest attention on a GPU: one call of torch's variable-length flash kernel for a whole batch.

Each run of segments (`attention_runs`) is one of the kernel's sequences. Its queries are the run's tokens,
its keys those of its ancestors and its own, and causal means aligned at the lower right: the last query sees
every key. Ancestors' keys are gathered, one copy for each run below them (a pair's prefix stands twice), so a
layer stores as many keys as all runs see. Half precision on CUDA only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from rayrm.data.packing import PackedBatch, attention_runs
from rayrm.model.host_copy import copied


@dataclass(frozen=True, slots=True)
class Varlen:
    """The sequences of one batch: R runs with T queries and U >= T keys in all.

    `query_ends`, `key_ends` int32 `[R + 1]` are cumulative lengths from 0; `keys` int64 `[U]` says which
    packed token each key is, None where no run has ancestors. `kernel` is called as torch's `varlen_attn`;
    it is told of grouped heads where it `asks_for_groups` (torch 2.11 takes them without being told).
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int
    keys: torch.Tensor | None
    kernel: Callable[..., Any]
    asks_for_groups: bool

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device, kernel: Callable[..., Any] = varlen_attn) -> Varlen:
        """Plan the call; what the kernel reads lives on `device`."""
        begins, ends = batch.start, batch.start + batch.length
        runs = list(attention_runs(batch.parent))
        num_queries = [int(ends[run.segments[-1]] - begins[run.segments[0]]) for run in runs]
        keys = [
            np.concatenate([np.arange(begins[s], ends[s]) for s in run.ancestors + run.segments])
            for run in runs
        ]
        num_keys = [len(seen) for seen in keys]
        gathered = any(run.ancestors for run in runs)
        return cls(
            _cumulative(num_queries, device),
            _cumulative(num_keys, device),
            max(num_queries),
            max(num_keys),
            copied(np.concatenate(keys), device) if gathered else None,
            kernel,
            "enable_gqa" in inspect.signature(kernel).parameters,
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, H, T, D]`."""
        assert softcap is None, "the kernel has no cap: `choose_path` takes another path"
        # The kernel's layout is [tokens, heads, D].
        queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
        if self.keys is not None:
            keys, values = _gathered(keys, self.keys), _gathered(values, self.keys)
        options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
        if self.asks_for_groups:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        attended: torch.Tensor = self.kernel(
            queries, keys, values, self.query_ends, self.key_ends, self.max_queries, self.max_keys, **options
        )
        return attended.transpose(0, 1)[None]


class _Gather(torch.autograd.Function):
    """Rows of a tensor; a row's gradients are added up in float32, since many runs may see one ancestor."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(tokens)
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        (gradient,) = gradients
        total = gradient.new_zeros(ctx.num_tokens, *gradient.shape[1:], dtype=torch.float32)
        return total.index_add_(0, index, gradient.float()).to(gradient.dtype), None


def _gathered(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = _Gather.apply(tokens, index)  # type: ignore[no-untyped-call]
    return rows


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return copied(np.cumsum([0, *lengths], dtype=np.int32), device)
