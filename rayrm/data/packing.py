"""The token forest: sequences that begin alike are laid out so that each shared token stands once.

A `PackedBatch` is a list of segments in depth-first order. A token attends to its segment's ancestors and,
causally, to its own segment. A preference pair is the three-segment case: the longest common token prefix,
the chosen tail, the rejected tail; rows of one prompt grow in one tree. Pure numpy: no torch, no ray.
Invariants, each a test:

1. Walking a sequence's segments from its root gives exactly its ids, at positions 0, 1, 2, ...
2. With sharing, no two segments with the same parent begin with the same token: so each distinct prefix of
   the batch's sequences stands there once, whichever rows they belong to.
3. A parent comes before its children; segments tile `[0, num_tokens)` without gap or overlap.
4. `pooled[n]` is the packed index of sequence n's rightmost token that is not the pad token.
5. A row's comparisons are those of its ranks, and their weights add up to the row's weight (`terms.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rayrm.data.terms import NO_TERMS, Terms, terms_of
from rayrm.data.terms import Indices as Indices
from rayrm.objective import Objective

if TYPE_CHECKING:
    from rayrm.data.tokenize import TokenizedRow

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch(Terms):
    """T tokens in S segments, N scores and the loss's terms over them: `Terms`.

    Tokens: `ids`, `positions` `[T]`. Segments: `parent` (-1 for a root), `start`, `length` `[S]`.
    Scores: `pooled` `[N]`, packed token indices, one for each sequence in the order given (a row's
    completions, row after row); equal sequences are read at the same token.
    `num_unshared_tokens` counts what would be computed without sharing.
    """

    ids: Indices
    positions: Indices
    parent: Indices
    start: Indices
    length: Indices
    pooled: Indices
    num_unshared_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_scores(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True, slots=True)
class AttentionRun:
    """Neighbouring segments where each is the first child of the one before: one causal block of queries.

    `segments` of the run itself, and `ancestors`, the segments that all its queries see in full, root first.
    """

    segments: tuple[int, ...]
    ancestors: tuple[int, ...]


@dataclass(slots=True)
class _Forest:
    """The arrays of a `PackedBatch` while they grow."""

    parts: list[Ids] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    first_position: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, part: Ids, parent: int, first_position: int) -> int:
        self.parts.append(part)
        self.parent.append(parent)
        self.start.append(self.num_tokens)
        self.first_position.append(first_position)
        self.num_tokens += len(part)
        return len(self.parts) - 1


def pooled_offset(ids: Ids, pad_token_id: int | None) -> int:
    """Where a decoder's score is read: the rightmost id that is not the pad id, as transformers pools.

    A sequence of nothing but pads is read at 0, also as transformers does. Without a pad id, at the end.
    """
    if pad_token_id is None:
        return len(ids) - 1
    (kept,) = np.nonzero(ids != pad_token_id)
    return int(kept[-1]) if len(kept) else 0


def common_prefix_length(sequences: Sequence[Ids], begin: int = 0) -> int:
    """How many leading tokens all `sequences` have in common; the first `begin` are known to be equal."""
    first = sequences[0]
    end = min(map(len, sequences))
    for other in sequences[1:]:
        if end == begin:
            break
        differs = first[begin:end] != other[begin:end]
        place = int(differs.argmax())
        if differs[place]:
            end = begin + place
    return end


def distinct_cost(sequences: Sequence[Ids], begin: int = 0) -> tuple[int, int]:
    """Tokens of the forest that these sequences make, and the (query, key) pairs of its attention.

    In sorted order a sequence adds what it does not share with its neighbour before. The first `begin` tokens
    are known to be common to all.
    """
    ordered = sequences
    if len(sequences) > 2:
        ordered = sorted(sequences, key=lambda ids: ids.astype(">u4").tobytes())
    lengths = [len(ids) for ids in ordered]
    known = [0, *(common_prefix_length(pair, begin) for pair in pairwise(ordered))]
    tokens = sum(lengths) - sum(known)
    return tokens, sum(n * (n + 1) // 2 for n in lengths) - sum(n * (n + 1) // 2 for n in known)


def _grow(
    forest: _Forest, sequences: Sequence[Ids], members: list[int], pooled_at: list[int], pooled: list[int]
) -> None:
    """Add one group of sequences to the forest and write each member's pooled token index to `pooled`."""
    pending = [(members, 0, -1)]
    while pending:
        group, begin, parent = pending.pop()
        end = common_prefix_length([sequences[n] for n in group], begin)
        if end > begin:
            parent = forest.add(sequences[group[0]][begin:end], parent, begin)
            for n in group:
                if begin <= pooled_at[n] < end:
                    pooled[n] = forest.start[parent] + pooled_at[n] - begin
        children: dict[int, list[int]] = {}
        for n in group:
            if len(sequences[n]) > end:
                children.setdefault(int(sequences[n][end]), []).append(n)
        # Last in, first out: pushed in reverse, the branches come out depth-first in order of appearance.
        pending.extend((branch, end, parent) for branch in reversed(list(children.values())))


def build_forest(
    sequences: Sequence[Ids], groups: Sequence[Sequence[int]], pad_token_id: int | None
) -> tuple[_Forest, list[int]]:
    """Lay out `sequences`; those of one group share their common beginnings, groups share nothing."""
    forest = _Forest()
    pooled = [-1] * len(sequences)
    pooled_at = [pooled_offset(ids, pad_token_id) for ids in sequences]
    for group in groups:
        _grow(forest, sequences, list(group), pooled_at, pooled)
    return forest, pooled


def pack_rows(
    rows: Sequence[TokenizedRow],
    pad_token_id: int | None,
    *,
    share: bool = True,
    weights: Sequence[float] | None = None,
    objective: Objective | None = None,
) -> PackedBatch:
    """Lay out rows, all in one forest; a row of weight w (1 unless given) with n comparisons weighs w/n each.

    `objective` says which terms rows make beside their comparisons (None: the usual ones).
    `share=False` gives every completion its own root segment (padding-free, nothing shared).
    """
    sequences = [ids for row in rows for ids in row.sequences]
    terms = terms_of(rows, weights or [1.0] * len(rows), objective or Objective())
    return _batch(sequences, pad_token_id, share, terms)


def pack_texts(sequences: Sequence[Ids], pad_token_id: int | None, *, share: bool = True) -> PackedBatch:
    """Lay out texts to be scored: score n belongs to sequence n; there is no comparison."""
    return _batch(sequences, pad_token_id, share, NO_TERMS)


def _batch(sequences: Sequence[Ids], pad_token_id: int | None, share: bool, terms: Terms) -> PackedBatch:
    # What begins with another token shares nothing.
    groups: dict[int, list[int]] = {}
    for n, ids in enumerate(sequences):
        groups.setdefault(int(ids[0]) if share else n, []).append(n)
    forest, pooled = build_forest(sequences, list(groups.values()), pad_token_id)
    lengths = [len(part) for part in forest.parts]
    positions = [
        np.arange(first, first + length) for first, length in zip(forest.first_position, lengths, strict=True)
    ]
    return PackedBatch(
        ids=np.concatenate(forest.parts).astype(np.int64),
        positions=np.concatenate(positions).astype(np.int64),
        parent=np.asarray(forest.parent, np.int64),
        start=np.asarray(forest.start, np.int64),
        length=np.asarray(lengths, np.int64),
        pooled=np.asarray(pooled, np.int64),
        num_unshared_tokens=sum(len(ids) for ids in sequences),
        **{part.name: getattr(terms, part.name) for part in fields(Terms)},
    )


def padded_to(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with as many tokens as a multiple of `multiple`: a segment at the end that nothing reads."""
    short = -batch.num_tokens % multiple
    if not short:
        return batch
    return replace(
        batch,
        ids=np.append(batch.ids, np.repeat(batch.ids[:1], short)),
        positions=np.append(batch.positions, np.arange(short)),
        parent=np.append(batch.parent, -1),
        start=np.append(batch.start, batch.num_tokens),
        length=np.append(batch.length, short),
    )


def ancestors_of(parent: Indices, segment: int) -> tuple[int, ...]:
    """The segments above `segment`, root first."""
    path: list[int] = []
    above = int(parent[segment])
    while above >= 0:
        path.append(above)
        above = int(parent[above])
    return tuple(reversed(path))


def attention_runs(parent: Indices) -> Iterator[AttentionRun]:
    """Cut the forest into causal blocks, so that a pair costs two attention calls and not three.

    A first child directly follows its parent, so prefix and chosen tail are one plain causal sequence; only
    the rejected tail needs the prefix's keys in front of its own.
    """
    run: list[int] = []
    for segment in range(len(parent)):
        if run and int(parent[segment]) != segment - 1:
            yield AttentionRun(tuple(run), ancestors_of(parent, run[0]))
            run = []
        run.append(segment)
    if run:
        yield AttentionRun(tuple(run), ancestors_of(parent, run[0]))
