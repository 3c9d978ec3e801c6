"""Ropes that turn all positions of a forward otherwise once one of them is beyond a limit.

"dynamic" scales with the longest position, beyond the model's position limit; "longrope" takes its long
factors beyond the length of its first training. A text's score is that of the text alone, so texts that would
change each other's positions are computed in forwards of their own: those within the limit together; of those
beyond it each by itself with "dynamic", all together with "longrope".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ScalingRope:
    """`kind` as the config names it; texts of at most `limit` tokens are turned plainly.

    `alone`: texts beyond it do not agree with each other either.
    """

    kind: str
    limit: int
    alone: bool

    @classmethod
    def of(cls, config: Any) -> ScalingRope | None:
        """What a model's text config says; None where positions never scale."""
        rope = getattr(config, "rope_parameters", None) or {}
        found: list[tuple[int, str]] = []
        # Models whose layers differ have one for each layer type.
        for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
            if part.get("rope_type") == "dynamic":
                found.append((getattr(config, "max_position_embeddings", None) or 0, "dynamic"))
            elif part.get("rope_type") == "longrope":
                found.append((part.get("original_max_position_embeddings") or 0, "longrope"))
        if not found:
            return None
        limit, kind = min(found)
        return cls(kind, limit, alone=kind == "dynamic" or len(set(found)) > 1)

    def forwards(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which texts of these lengths may be computed in one forward."""
        plain = [n for n, length in enumerate(lengths) if length <= self.limit]
        beyond = [n for n, length in enumerate(lengths) if length > self.limit]
        scaled = [[n] for n in beyond] if self.alone else [beyond]
        return [texts for texts in (plain, *scaled) if texts]


def forget_longer_texts(model: torch.nn.Module) -> None:
    """Undo what a longer text left behind: "dynamic" goes on as for the longest text it has seen."""
    for module in model.modules():
        limit = getattr(module, "original_max_seq_len", None)
        if not isinstance(limit, int):
            continue
        state: Any = module
        for name in [key for key in vars(module) if key.endswith("max_seq_len_cached")]:
            if getattr(state, name) > limit:
                prefix = name.removesuffix("max_seq_len_cached")
                setattr(state, name, limit)
                frequencies = getattr(state, f"{prefix}inv_freq")
                frequencies_before = getattr(state, f"{prefix}original_inv_freq").to(frequencies.device)
                state.register_buffer(f"{prefix}inv_freq", frequencies_before, persistent=False)
