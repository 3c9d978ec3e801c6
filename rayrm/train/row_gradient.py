"""The gradient of a CPU run's input embedding, held by row: a step touches hundreds of many thousands.

torch's dense gradient of an embedding is written, summed, measured and clipped in full for every step; for a
small model that costs a tenth of it. Here autograd gives the touched rows (`Embedding.sparse`), and only the
optimizer sees a dense gradient: one buffer, kept from step to step, zero outside the rows in use. The
numbers are the same. On a GPU, where finding the touched rows would wait for the device, nothing changes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import PreTrainedModel


class RowGradient:
    """What `TorchEngine` holds of one embedding; `close` leaves the embedding as it was."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        self._embedding = embedding
        self._weight: torch.Tensor = embedding.weight
        self._dense: torch.Tensor | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        embedding.sparse = True

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> RowGradient | None:
        """The model's input embedding, where it is trained on the CPU and no other module uses its weight."""
        embedding = model.get_input_embeddings()
        if device.type != "cpu" or not isinstance(embedding, torch.nn.Embedding):
            return None
        if not embedding.weight.requires_grad:
            return None
        users = [
            m for m in model.modules() if any(p is embedding.weight for p in m.parameters(recurse=False))
        ]
        return cls(embedding) if len(users) == 1 else None

    @property
    def weight(self) -> torch.Tensor:
        return self._weight

    def take(self, world_size: int) -> torch.Tensor:
        """The gradient's touched rows `[R, D]`, of all ranks' rows together (not yet summed over ranks).

        Until `give` the weight has no gradient.
        """
        local = self._weight.grad
        self._weight.grad = None
        touched = torch.zeros(len(self._weight), dtype=torch.uint8)
        if local is not None:
            local = local.coalesce()
            touched[local.indices()[0]] = 1
        if world_size > 1:
            dist.all_reduce(touched, op=dist.ReduceOp.MAX)
        self._rows = touched.nonzero()[:, 0]
        if local is not None and len(self._rows) == local.indices().shape[1]:
            return local.values()
        values = self._weight.new_zeros(len(self._rows), self._weight.shape[1])
        if local is not None:
            values[torch.searchsorted(self._rows, local.indices()[0])] = local.values()
        return values

    def give(self, values: torch.Tensor) -> None:
        """Make `values` (summed, clipped) the weight's dense gradient, for the optimizer."""
        if self._dense is None:
            self._dense = torch.zeros_like(self._weight)
        self._dense[self._rows] = values
        self._weight.grad = self._dense

    def clear(self) -> None:
        """After the optimizer: no gradient, and a buffer of zeros again."""
        assert self._dense is not None
        self._dense[self._rows] = 0.0
        self._weight.grad = None

    def close(self) -> None:
        self._embedding.sparse = False
