"""As roll/distributed/scheduler/protocol.py of alibaba/ROLL at 8eb27cc2: a batch, made and cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class DataProto:
    batch: dict[str, torch.Tensor]
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls, tensors: dict[str, torch.Tensor], non_tensors: dict[str, Any] | None = None
    ) -> DataProto:
        assert len({len(tensor) for tensor in tensors.values()}) == 1, "rows differ"
        rows = {}
        for key, values in (non_tensors or {}).items():
            rows[key] = np.empty(len(values), dtype=object)
            rows[key][:] = values
        return cls(tensors, rows)

    def rows(self, first: int, end: int) -> DataProto:
        return DataProto(
            {key: tensor[first:end] for key, tensor in self.batch.items()},
            {key: values[first:end] for key, values in self.non_tensor_batch.items()},
        )
