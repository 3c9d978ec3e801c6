"""Forest attention on a CPU: torch's flash kernel, called for tiles of queries and the keys that they see.

What `SegmentLoop` computes, in one autograd function for the whole batch: keys are neither split nor joined
in the graph, gradients are written in place, grouped heads are not repeated, and a tile of a long run does
not meet the keys behind it. The kernel is the one that `scaled_dot_product_attention` takes on a CPU; it is
called by its ATen name, since the public function keeps the log-sum-exp that the backward needs to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from rayrm.data.packing import PackedBatch, attention_runs

# Queries a tile: 64 to 256 are within 2% of each other (runs of 100 to 1000 tokens, 9 heads of 64, 2 cores).
_TILE = 128
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries `begin:end`, the ranges of keys they see (the last ends with the tile), and the mask over both.

    `mask` is None where a tile sees only itself: plainly causal.
    """

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Tiled:
    """The tiles of one batch."""

    tiles: list[_Tile]

    @staticmethod
    def available() -> bool:
        """Whether this torch has the kernel."""
        return hasattr(torch.ops.aten, _FORWARD)

    @classmethod
    def of(cls, batch: PackedBatch) -> Tiled:
        """Cut the runs of a batch into tiles."""
        return cls(_tiles(batch))

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
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended: torch.Tensor = _TiledAttention.apply(query, key, value, self.tiles, scale)  # type: ignore[no-untyped-call]
        return attended


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: list[_Tile],
        scale: float,
    ) -> torch.Tensor:
        attended = torch.empty_like(query)
        # [1, H, T] over memory [1, T, H], as the kernel lays it out.
        logsumexp = query.new_empty(1, query.shape[2], query.shape[1], dtype=torch.float32).transpose(1, 2)
        for tile in tiles:
            own = slice(tile.begin, tile.end)
            part, part_logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, own],
                _taken(key, tile.keys),
                _taken(value, tile.keys),
                0.0,
                tile.mask is None,
                attn_mask=_as(tile.mask, query),
                scale=scale,
            )
            attended[:, :, own] = part
            logsumexp[:, :, own] = part_logsumexp
        ctx.save_for_backward(query, key, value, attended, logsumexp)
        ctx.tiles, ctx.scale = tiles, scale
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, attended, logsumexp = ctx.saved_tensors
        (upstream,) = gradients
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        for tile in ctx.tiles:
            own = slice(tile.begin, tile.end)
            to_query[:, :, own], to_keys, to_values = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    upstream[:, :, own],
                    query[:, :, own],
                    _taken(key, tile.keys),
                    _taken(value, tile.keys),
                    attended[:, :, own],
                    logsumexp[:, :, own],
                    0.0,
                    tile.mask is None,
                    attn_mask=_as(tile.mask, query),
                    scale=ctx.scale,
                )
            )
            place = 0
            for begin, end in tile.keys:
                part = slice(place, place + end - begin)
                to_key[:, :, begin:end] += to_keys[:, :, part]
                to_value[:, :, begin:end] += to_values[:, :, part]
                place += end - begin
        return to_query, to_key, to_value, None, None


def _taken(keys: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [keys[:, :, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _as(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    return None if mask is None else mask.to(query.dtype)


def _tiles(batch: PackedBatch) -> list[_Tile]:
    cut = list(_cut(batch))
    behind = [_behind(begin, end, keys) for begin, end, keys in cut]
    mask = _causal_behind(max(behind, default=0))
    return [
        _Tile(begin, end, keys, _seen(mask, end - begin, known) if known else None)
        for (begin, end, keys), known in zip(cut, behind, strict=True)
    ]


def _cut(batch: PackedBatch) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """Each tile's queries `begin`, `end`, and the ranges of keys they see."""
    starts, ends = batch.start.tolist(), (batch.start + batch.length).tolist()
    for run in attention_runs(batch.parent):
        above = _joined([(starts[s], ends[s]) for s in run.ancestors])
        begin, end = starts[run.segments[0]], ends[run.segments[-1]]
        num_tiles = -(-(end - begin) // _TILE)
        cuts = [begin + (end - begin) * n // num_tiles for n in range(num_tiles + 1)]
        for first, last in pairwise(cuts):
            yield first, last, tuple(_joined([*above, (begin, last)]))


def _behind(begin: int, end: int, keys: tuple[tuple[int, int], ...]) -> int:
    """How many keys every query of a tile sees."""
    return sum(last - first for first, last in keys) - (end - begin)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same tokens in as few ranges as can be."""
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _causal_behind(known: int) -> torch.Tensor:
    """Additive mask `[_TILE, known + _TILE]`: queries that see `known` keys, and causally each other.

    Masks of tiles that see fewer are parts of it, so that a batch of long texts holds one and not one a tile.
    """
    return torch.full((_TILE, known + _TILE), -torch.inf).triu_(diagonal=known + 1)


def _seen(mask: torch.Tensor, queries: int, known: int) -> torch.Tensor:
    """The part of `mask` for so many queries that see `known` keys before themselves."""
    first = mask.shape[1] - _TILE - known
    return mask[:queries, first : first + known + queries]
