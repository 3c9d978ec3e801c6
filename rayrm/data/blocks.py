"""Rows -> Arrow tables of tokenized pairs, and what is read back from such a table.

A table holds accepted and refused rows alike, each with its place in the data, so that nothing gets lost
between reading and counting. Its index (lengths, places, digests) is small; the ids stay in the table.
Pure: numpy and pyarrow, no ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrm.data.preference import PairForm, PreferencePair, form_of, parse_row
from rayrm.data.sources import SourceRow
from rayrm.data.tokenize import TokenizedPair, tokenize_pairs
from rayrm.errors import RowError

PAIRS_PER_TABLE = 512
RAW_LIMIT = 4096
DIGEST_SIZE = 16
SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("prefix_length", pa.int32()),
        ("chosen_length", pa.int32()),
        ("rejected_length", pa.int32()),
        ("margin", pa.float64()),
        ("digest", pa.binary(DIGEST_SIZE)),
        ("form", pa.string()),
        ("reason", pa.string()),  # null: accepted
        ("message", pa.string()),
        ("raw", pa.string()),
    ]
)
Counts = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """A row that became no pair: its place, why, and its text (cut at 4 kB); ordered by place."""

    source: int
    row: int
    reason: str
    message: str
    raw: str


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """What the driver keeps of a table with P accepted rows; `offset` is their position in the table.

    `source`, `row`, `offset`, the three lengths, `margin`: `[P]`; `digest`: uint8 `[P, 16]`. `forms`: the
    first row (source, row) of each text form seen, refused after parsing or not.
    """

    source: Places
    row: Places
    offset: Places
    prefix_length: Counts
    chosen_length: Counts
    rejected_length: Counts
    margin: npt.NDArray[np.float64]
    digest: npt.NDArray[np.uint8]
    forms: dict[PairForm, tuple[int, int]]
    refusals: list[Refusal]
    num_rows: int


def tokenized_tables(
    rows: Iterable[SourceRow], tokenizer: Any, max_length: int | None, num_rows: int = PAIRS_PER_TABLE
) -> Iterator[pa.Table]:
    """The rows' tables of at most `num_rows` rows each; every row is in one of them, as a pair or refused."""
    reader = iter(rows)
    while batch := list(islice(reader, num_rows)):
        parsed = [_parsed(row) for row in batch]
        places = [index for index, pair in enumerate(parsed) if isinstance(pair, PreferencePair)]
        pairs = [pair for pair in parsed if isinstance(pair, PreferencePair)]
        outcomes: list[TokenizedPair | RowError | None] = [
            entry if isinstance(entry, RowError) else None for entry in parsed
        ]
        for index, outcome in zip(places, tokenize_pairs(tokenizer, pairs, max_length), strict=True):
            outcomes[index] = outcome
        forms = [form_of(entry) if isinstance(entry, PreferencePair) else None for entry in parsed]
        yield pa.Table.from_pylist(
            [_record(*parts) for parts in zip(batch, outcomes, forms, strict=True)], SCHEMA
        )


def table_of_pairs(pairs: Sequence[TokenizedPair]) -> pa.Table:
    """Pairs made elsewhere, as a table: row i of source 0 is pair i."""
    places = [SourceRow(0, number, f"pairs[{number}]", None) for number in range(len(pairs))]
    records = [_record(place, pair, "tokenized") for place, pair in zip(places, pairs, strict=True)]
    return pa.Table.from_pylist(records, SCHEMA)


def index_of(table: pa.Table) -> BlockIndex:
    """The index of a table, without its ids."""
    if not len(table):
        table = SCHEMA.empty_table()  # Ray Data's empty blocks have no columns
    accepted = np.flatnonzero(table.column("reason").is_null().to_numpy())
    column = {name: table.column(name).to_numpy() for name in SCHEMA.names[:2] + SCHEMA.names[3:6]}
    digests = b"".join(table.column("digest").take(pa.array(accepted)).to_pylist())
    places = list(zip(column["source"].tolist(), column["row"].tolist(), strict=True))
    forms: dict[PairForm, tuple[int, int]] = {}
    for form, place in zip(table.column("form").to_pylist(), places, strict=True):
        if form is not None:
            forms[form] = min(place, forms.get(form, place))
    refused = table.filter(pa.compute.is_valid(table.column("reason")))
    refusals = refused.select(["source", "row", "reason", "message", "raw"]).to_pylist()
    return BlockIndex(
        column["source"][accepted].astype(np.int64),
        column["row"][accepted],
        accepted,
        column["prefix_length"][accepted],
        column["chosen_length"][accepted],
        column["rejected_length"][accepted],
        table.column("margin").to_numpy()[accepted].astype(np.float64),
        np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE),
        forms,
        [Refusal(**refusal) for refusal in refusals],
        len(table),
    )


class PairBlock:
    """A table opened for taking pairs out of it; the arrays are views of the table, the pairs are copies."""

    def __init__(self, table: pa.Table) -> None:
        ids = table.column("ids").combine_chunks()
        self._values: npt.NDArray[np.int32] = ids.values.to_numpy()
        self._starts: Counts = ids.offsets.to_numpy()
        self._columns = [
            table.column(name).to_numpy()
            for name in ("prefix_length", "chosen_length", "rejected_length", "margin")
        ]

    def pair(self, offset: int) -> TokenizedPair:
        """The pair at a position of the table."""
        prefix, chosen, rejected, margin = (column[offset] for column in self._columns)
        ids = self._values[self._starts[offset] : self._starts[offset + 1]].copy()
        return TokenizedPair(ids, int(prefix), int(chosen), int(rejected), float(margin))


def _parsed(row: SourceRow) -> PreferencePair | RowError:
    if isinstance(row.content, RowError):
        return row.content
    try:
        return parse_row(row.content)
    except RowError as error:
        return error


def _record(row: SourceRow, outcome: TokenizedPair | RowError | None, form: str | None) -> dict[str, Any]:
    assert outcome is not None
    place = {"source": row.source, "row": row.number, "form": form}
    if isinstance(outcome, TokenizedPair):
        return {
            **place,
            "ids": outcome.ids,
            "prefix_length": outcome.prefix_length,
            "chosen_length": outcome.chosen_length,
            "rejected_length": outcome.rejected_length,
            "margin": outcome.margin,
            "digest": _digest(outcome),
        }
    return {
        **place,
        "ids": [],
        "prefix_length": 0,
        "chosen_length": 0,
        "rejected_length": 0,
        "margin": 0.0,
        "digest": bytes(DIGEST_SIZE),
        "reason": outcome.reason,
        "message": f"{row.where}: {outcome}",
        "raw": _raw(row),
    }


def _digest(pair: TokenizedPair) -> bytes:
    content = hashlib.blake2b(pair.ids.tobytes(), digest_size=DIGEST_SIZE)
    content.update(
        f"{pair.prefix_length},{pair.chosen_length},{pair.rejected_length},{pair.margin!r}".encode()
    )
    return content.digest()


def _raw(row: SourceRow) -> str:
    if row.line is not None:
        return row.line[:RAW_LIMIT].decode("utf-8", "replace").rstrip("\r\n")
    return json.dumps(row.content, default=repr)[:RAW_LIMIT]
