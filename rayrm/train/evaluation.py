"""Score a set of pairs on all ranks and bring the scores together: exact, each pair once.

Shapes: P pairs. The order of the result is the set's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.packing import PackedBatch, pack_pairs
from rayrm.data.planning import plan_step
from rayrm.data.tokenize import TokenizedPair
from rayrm.model.forward import DeviceBatch, PackedScorer, to_device
from rayrm.model.layout import Layout, choose_layout, unwrapped
from rayrm.train.precision import in_precision, resolve_precision

Scores = npt.NDArray[np.float64]
DEFAULT_TOKEN_BUDGET = 8192
_PAIRS_PER_ROUND = 256


class PairSet(Protocol):
    """Tokenized pairs by position, with their lengths in tokens and their margins, each `[num_pairs]`."""

    @property
    def num_pairs(self) -> int: ...

    prefix_lengths: npt.NDArray[np.int32]
    chosen_lengths: npt.NDArray[np.int32]
    rejected_lengths: npt.NDArray[np.int32]
    margins: npt.NDArray[np.float64]

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedPair]: ...


def computed_tokens(pairs: PairSet, rows: npt.NDArray[np.int64], layout: Layout) -> npt.NDArray[np.int64]:
    """What each row costs in this layout, in tokens (padding not counted)."""
    both = pairs.chosen_lengths[rows].astype(np.int64) + pairs.rejected_lengths[rows]
    return both - pairs.prefix_lengths[rows] if layout.name == "shared" else both


def score_pairs(
    scores_of: Callable[[DeviceBatch], torch.Tensor],
    pairs: PairSet,
    *,
    layout: Layout,
    pad_token_id: int | None,
    max_tokens: int,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Scores, Scores]:
    """(chosen, rejected) scores, each `[P]`, on every rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    both = np.zeros((pairs.num_pairs, 2))
    for begin in range(0, pairs.num_pairs, _PAIRS_PER_ROUND * world):
        rows = np.arange(begin, min(begin + _PAIRS_PER_ROUND * world, pairs.num_pairs))
        costs = computed_tokens(pairs, rows, layout)
        budget = max(max_tokens, int(costs.max()))
        for microbatch in plan_step(costs, num_ranks=world, max_tokens=budget)[rank]:
            chosen_rows = rows[list(microbatch.rows)]
            batch = _pack(pairs.fetch(chosen_rows), pad_token_id, layout)
            with torch.inference_mode():
                scores = scores_of(to_device(batch, device)).double().cpu().numpy()
            if microbatch.weights[0] > 0:
                both[chosen_rows] = scores.reshape(-1, 2)
        if on_progress is not None:
            on_progress(int(rows[-1]) + 1)
    if world > 1:
        # Each pair was scored by one rank and is zero on the others.
        total = torch.from_numpy(both).to(device)
        dist.all_reduce(total)
        both = total.cpu().numpy()
    return both[:, 0], both[:, 1]


def _pack(pairs: list[TokenizedPair], pad_token_id: int | None, layout: Layout) -> PackedBatch:
    return pack_pairs(pairs, pad_token_id, share=layout.name == "shared")


def score_model(
    model: torch.nn.Module,
    pairs: PairSet,
    config: RewardConfig,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Scores, Scores]:
    """Score pairs with a model in this process, in the precision that training uses."""
    device = next(model.parameters()).device
    layout = choose_layout(model, share_prefix=config.share_prefix, train=False)
    module = PackedScorer(model, layout)
    was_training = model.training
    module.eval()
    precision = resolve_precision(config, device)
    try:
        return score_pairs(
            lambda batch: in_precision(module, batch, precision),
            pairs,
            layout=layout,
            pad_token_id=unwrapped(model).config.get_text_config().pad_token_id,
            max_tokens=config.max_tokens_per_microbatch or DEFAULT_TOKEN_BUDGET,
            device=device,
            on_progress=on_progress,
        )
    finally:
        module.release()
        module.train(was_training)
