"""[RAY] Tokenized rows in the data's own order, by position, wherever their blocks lie.

Blocks are tables of this process, references into Ray's object store, or record batches of a token cache's
files. What a set knows of its rows without their ids (`index`) is in memory, about 110 bytes a pair.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrm.data.blocks import BlockIndex, RowBlock, index_of, table_of_rows
from rayrm.data.cache import CachedBlock
from rayrm.data.order import Part
from rayrm.data.preference import PairForm
from rayrm.data.row_index import Counts, RowIndex
from rayrm.data.selection import HELD_OUT
from rayrm.data.sources import row_name
from rayrm.data.tokenize import TokenizedRow
from rayrm.errors import DataError

_OPEN_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What became of a source's rows.

    Of `num_rows` read, `num_accepted` are in the set, with `num_completions` completions; a pair has two.
    `num_tokens` counts every completion whole; `num_shared_tokens` of them are prefixes counted again.
    `fingerprint` is a hash of the rows in order: the same for the same rows, however they were read.
    `attributes`: by which completions are rated, in the order of the index's columns.
    """

    name: str
    num_rows: int
    num_accepted: int
    num_completions: int
    refused: dict[str, int]
    text_form: PairForm
    fingerprint: str
    num_tokens: int
    num_shared_tokens: int
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowLabels:
    """Of R rows: `prompts` uint64 `[R]`, equal where the prompts are, and `groups`, R names.

    A row that names no part of its set is of its file, told by its name without its directory.
    """

    prompts: npt.NDArray[np.uint64]
    groups: list[str]


@dataclass(slots=True)
class TokenizedSet:
    """Tokenized rows in the data's own order, wherever they lie; pickles small, for Ray Train's workers.

    `index` holds what is known of them without their ids, `parts` how a mixture's rows are weighed. `fetch`
    gets the blocks it needs and keeps the last few open; the rows it gives are copies.
    """

    index: RowIndex
    report: IngestReport
    names: list[str]  # of its sources
    _blocks: list[Any]  # ObjectRefs of tables, or tables
    _block_of: Counts
    _offset: Counts
    parts: tuple[Part, ...] = ()
    _open: OrderedDict[int, RowBlock] = field(default_factory=OrderedDict, repr=False)

    @property
    def num_rows(self) -> int:
        return len(self._block_of)

    @classmethod
    def from_rows(cls, rows: Sequence[TokenizedRow], name: str = "rows") -> TokenizedSet:
        """A set of rows in this process's memory; needs and starts no Ray."""
        return cls.of_table(table_of_rows(rows), name)

    @classmethod
    def of_table(cls, table: pa.Table, name: str = "rows") -> TokenizedSet:
        """The accepted rows of a table in this process's memory."""
        return assemble(name, [name], [table], [index_of(table)])

    @property
    def sample(self) -> TokenizedSet:
        """Rows by which a run measures its memory: all."""
        return self

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]:
        """The rows at these positions (0 .. num_rows-1), in the order asked."""
        wanted = np.asarray(rows, dtype=np.int64)
        needed = self._block_of[wanted].tolist()
        absent = [block for block in dict.fromkeys(needed) if block not in self._open]
        opened = {block: self._open[block] for block in dict.fromkeys(needed) if block in self._open}
        opened |= zip(absent, map(RowBlock, _resolve([self._blocks[block] for block in absent])), strict=True)
        for block, content in opened.items():
            self._open[block] = content
            self._open.move_to_end(block)
        while len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        offsets = self._offset[wanted].tolist()
        return [opened[block].row(offset) for block, offset in zip(needed, offsets, strict=True)]

    def labels(self) -> RowLabels:
        """What the rows say of where they belong; reads those columns of every block."""
        columns = [_resolve([block])[0].select(["source", "prompt", "group"]) for block in self._blocks]
        starts = np.cumsum([0, *map(len, columns)])[:-1]
        labels = pa.concat_tables(columns).take(starts[self._block_of] + self._offset)
        named = zip(labels.column("group").to_pylist(), labels.column("source").to_pylist(), strict=True)
        files = [name.rpartition("/")[2] for name in self.names]
        groups = [files[source] if group is None else group for group, source in named]
        return RowLabels(labels.column("prompt").to_numpy(), groups)

    def name_of(self, row: TokenizedRow) -> str:
        """What messages call a row of this set: its file and line."""
        source, number = row.place
        return row_name(self.names[source], number)

    @property
    def rows_per_epoch(self) -> int:
        """What an epoch shows of the set: its parts by their weights."""
        return sum(part.rows_per_epoch for part in self.parts) if self.parts else self.num_rows

    def shares(self, groups: Sequence[str]) -> list[str]:
        """What an epoch shows of each group, where weights say so."""
        if not self.parts:
            return []
        shown: dict[str, list[int]] = {}
        for group, part in zip(groups, self.parts, strict=True):
            counts = shown.setdefault(group, [0, 0])
            counts[0] += part.num_rows
            counts[1] += part.rows_per_epoch
        return [f"  an epoch shows {of:,} of {group}'s {rows:,} rows" for group, (rows, of) in shown.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        told = (self.index, self.report, self.names, self._blocks, self._block_of, self._offset, self.parts)
        return TokenizedSet, told


def assemble(
    name: str,
    names: list[str],
    blocks: list[Any],
    indices: list[BlockIndex],
    group_of: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> TokenizedSet:
    """The set of all blocks' rows, ordered by (source, row).

    `group_of`: the group of each source, whose files count as one: rounded file by file, a weight of 0.1
    would show nothing of files of three rows. `weights`: of each group.
    """

    def joined(field_name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(index, field_name) for index in indices])

    order = np.lexsort((joined("row"), joined("source")))
    rows = RowIndex.joined([index.rows for index in indices]).take(order)
    block_of = np.repeat(np.arange(len(blocks), dtype=np.int32), [len(index.row) for index in indices])
    num_tokens = int(rows.tokens(share=False).sum())
    report = IngestReport(
        name=name,
        num_rows=sum(index.num_rows for index in indices),
        num_accepted=len(order),
        num_completions=len(rows.lengths),
        refused=_refused(indices),
        text_form=next((form for index in indices for form in index.forms), "tokenized"),
        fingerprint=hashlib.sha256(joined("digest")[order].tobytes()).hexdigest(),
        num_tokens=num_tokens,
        num_shared_tokens=num_tokens - int(rows.tokens(share=True).sum()),
    )
    offset = joined("offset")[order].astype(np.int32)
    parts: tuple[Part, ...] = ()
    if any(weight != 1 for weight in weights):
        counts = np.bincount(np.asarray(group_of)[joined("source")], minlength=len(weights)).tolist()
        parts = tuple(Part(count, weight) for count, weight in zip(counts, weights, strict=True))
        if not sum(part.rows_per_epoch for part in parts):
            raise DataError(
                f"an epoch shows no row of {name}: the weights are too small for its {len(order)} rows; "
                "raise `weight`"
            )
    return TokenizedSet(rows, report, names, blocks, block_of[order], offset, parts)


def _resolve(blocks: list[Any]) -> list[pa.Table]:
    if not blocks or isinstance(blocks[0], pa.Table):
        return blocks
    if isinstance(blocks[0], CachedBlock):
        return [_cached_table(block) for block in blocks]
    import ray

    tables: list[pa.Table] = ray.get(blocks)
    return tables


def _cached_table(block: CachedBlock) -> pa.Table:
    try:
        return block.table()
    except OSError as error:
        raise DataError(
            f"token cache entry {block.path} is gone or cannot be read ({error}): start again to make it "
            "anew, and leave the cache alone while runs use it"
        ) from error


def _refused(indices: list[BlockIndex]) -> dict[str, int]:
    """How many rows were left out for each reason; rows of the split's other part come last."""
    counts = Counter(refusal.reason for index in indices for refusal in index.refusals)
    held_out = sum(sum(index.num_held_out.values()) for index in indices)
    return dict(counts.most_common()) | ({HELD_OUT: held_out} if held_out else {})
