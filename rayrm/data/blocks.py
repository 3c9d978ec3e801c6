"""Rows -> Arrow tables of tokenized rows, and what is read back from such a table.

A table holds accepted and refused rows alike, each with its place in the data, so that nothing gets lost
between reading and counting. Its index (lengths, ranks, places, digests) is small; the ids stay in the table.
Pure: numpy and pyarrow, no ray.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrm.data.labels import USUAL, LabelRules
from rayrm.data.packing import distinct_cost
from rayrm.data.preference import PairForm, PreferenceRow, form_of, parse_row
from rayrm.data.prefix_keys import BOUNDARIES, prefix_keys, text_key
from rayrm.data.row_index import Places, RowIndex
from rayrm.data.selection import EVERY_ROW, HELD_OUT, Selection, prompt_of
from rayrm.data.sources import SourceRow
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.errors import RowError

ROWS_PER_TABLE = 512
RAW_LIMIT = 4096
DIGEST_SIZE = 16
_KEYS_SIZE = 4 * len(BOUNDARIES)
GROUP_COLUMNS = ("group", "subset", "source")
"""The first of these that a row has as a string says which part of its set it belongs to."""
SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("prefix_length", pa.int32()),
        ("lengths", pa.list_(pa.int32())),
        ("ranks", pa.list_(pa.int32())),
        ("margin", pa.float64()),
        ("target", pa.float64()),
        ("ratings", pa.list_(pa.float64())),  # empty: none; K scores, then K times each attribute
        ("tokens", pa.int32()),  # distinct ones
        ("attention", pa.int64()),  # of those
        ("prefix_keys", pa.binary(_KEYS_SIZE)),
        ("text_keys", pa.list_(pa.uint64())),
        ("prompt", pa.uint64()),  # a hash of its text
        ("group", pa.string()),  # the subset or source that the row names; null: none
        ("digest", pa.binary(DIGEST_SIZE)),
        ("form", pa.string()),
        ("reason", pa.string()),  # null: accepted
        ("message", pa.string()),
        ("raw", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """A row that was not accepted: its place, why, and its text (cut at 4 kB); ordered by place."""

    source: int
    row: int
    reason: str
    message: str
    raw: str


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """What the driver keeps of a table with P accepted rows; `offset` is their position in the table.

    `source`, `row`, `offset`: `[P]`; `digest`: uint8 `[P, 16]`; `rows`: their index. `forms`: the first row
    (source, row) of each text form seen, refused after parsing or not. `num_rows_of`: rows by source;
    `num_held_out`: those of the split's other part, by source, which are in `num_rows` but no refusals.
    """

    source: Places
    row: Places
    offset: Places
    rows: RowIndex
    digest: npt.NDArray[np.uint8]
    forms: dict[PairForm, tuple[int, int]]
    refusals: list[Refusal]
    num_rows: int
    num_rows_of: dict[int, int]
    num_held_out: dict[int, int]


def tokenized_tables(
    rows: Iterable[SourceRow],
    tokenizer: Any,
    max_length: int | None,
    num_rows: int = ROWS_PER_TABLE,
    selection: Selection = EVERY_ROW,
    labels: LabelRules = USUAL,
) -> Iterator[pa.Table]:
    """The rows' tables of at most `num_rows` rows each; every row is in one of them, accepted or refused.

    `labels`: which rows the run can learn from. What `selection` leaves out is not tokenized; a row of the
    other part leaves no more than its place.
    """
    reader = iter(rows)
    while batch := list(islice(reader, num_rows)):
        parsed = [_parsed(row, selection, labels) for row in batch]
        batch = [
            SourceRow(row.source, row.number, row.where, None, b"") if _is_held_out(entry) else row
            for row, entry in zip(batch, parsed, strict=True)
        ]
        places = [index for index, entry in enumerate(parsed) if isinstance(entry, PreferenceRow)]
        accepted = [entry for entry in parsed if isinstance(entry, PreferenceRow)]
        outcomes: list[TokenizedRow | RowError | None] = [
            entry if isinstance(entry, RowError) else None for entry in parsed
        ]
        for index, outcome in zip(places, tokenize_rows(tokenizer, accepted, max_length), strict=True):
            outcomes[index] = outcome
        forms = [form_of(entry) if isinstance(entry, PreferenceRow) else None for entry in parsed]
        yield pa.Table.from_pylist(
            [_record(*parts) for parts in zip(batch, parsed, outcomes, forms, strict=True)], SCHEMA
        )


def table_of_rows(rows: Sequence[TokenizedRow]) -> pa.Table:
    """Rows made elsewhere, as a table: row i of source 0 is `rows[i]`."""
    places = [SourceRow(0, number, f"rows[{number}]", None) for number in range(len(rows))]
    records = [_record(place, None, row, "tokenized") for place, row in zip(places, rows, strict=True)]
    return pa.Table.from_pylist(records, SCHEMA)


def index_of(table: pa.Table) -> BlockIndex:
    """The index of a table, without its ids."""
    if not len(table):
        table = SCHEMA.empty_table()  # Ray Data's empty blocks have no columns
    column = {name: table.column(name).to_numpy() for name in ("source", "row")}
    places = list(zip(column["source"].tolist(), column["row"].tolist(), strict=True))
    forms: dict[PairForm, tuple[int, int]] = {}
    for form, place in zip(table.column("form").to_pylist(), places, strict=True):
        if form is not None:
            forms[form] = min(place, forms.get(form, place))
    is_accepted = table.column("reason").is_null()
    accepted = np.flatnonzero(is_accepted.to_numpy())
    kept = table.filter(is_accepted)
    # A null reason compares as null, which `filter` drops.
    is_held_out = pa.compute.equal(table.column("reason"), HELD_OUT)
    held_out = table.filter(is_held_out).column("source").to_numpy()
    refused = table.filter(pa.compute.invert(is_held_out))
    refusals = refused.select(["source", "row", "reason", "message", "raw"]).to_pylist()
    return BlockIndex(
        column["source"][accepted].astype(np.int64),
        column["row"][accepted],
        accepted,
        RowIndex.of(
            kept.column("prefix_length").to_numpy(),
            kept.column("margin").to_numpy(),
            np.frombuffer(b"".join(kept.column("prefix_keys").to_pylist()), np.uint32),
            pa.compute.list_value_length(kept.column("lengths")).to_numpy(),
            pa.compute.list_flatten(kept.column("lengths")).to_numpy(),
            pa.compute.list_flatten(kept.column("ranks")).to_numpy(),
            kept.column("tokens").to_numpy(),
            kept.column("attention").to_numpy(),
            pa.compute.list_flatten(kept.column("text_keys")).to_numpy(),
            kept.column("target").to_numpy(),
            *_ratings_of(kept),
        ),
        np.frombuffer(b"".join(kept.column("digest").to_pylist()), np.uint8).reshape(-1, DIGEST_SIZE),
        forms,
        [Refusal(**refusal) for refusal in refusals],
        len(table),
        _counts(column["source"]),
        _counts(held_out),
    )


def _ratings_of(table: pa.Table) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The score of each completion `[N]`, and its ratings by attribute `[N, A]`; NaN where there is none."""
    num_completions = pa.compute.list_value_length(table.column("lengths")).to_numpy()
    num_numbers = pa.compute.list_value_length(table.column("ratings")).to_numpy()
    stored = pa.compute.list_flatten(table.column("ratings")).to_numpy()
    num_attributes = int((num_numbers // num_completions).max(initial=1)) - 1
    scores = np.full(num_completions.sum(), np.nan)
    attributes = np.full((num_completions.sum(), max(0, num_attributes)), np.nan)
    # Of each number its place in its row: the first K are scores.
    row_of = np.repeat(np.arange(len(num_numbers)), num_numbers)
    place = np.arange(len(stored)) - (np.cumsum(num_numbers) - num_numbers)[row_of]
    first, count = (np.cumsum(num_completions) - num_completions)[row_of], num_completions[row_of]
    is_score = place < count
    scores[(first + place)[is_score]] = stored[is_score]
    if num_attributes > 0:
        rated = place[~is_score] - count[~is_score]
        attributes[first[~is_score] + rated // num_attributes, rated % num_attributes] = stored[~is_score]
    return scores, attributes


def _stored_ratings(row: TokenizedRow) -> tuple[float, ...]:
    """Scores and attributes in one list, which without attributes is that of the scores."""
    if not row.attributes:
        return row.ratings
    return (*(row.ratings or [math.nan] * len(row.ranks)), *row.attributes)


def _counts(sources: npt.NDArray[np.integer]) -> dict[int, int]:
    found, counts = np.unique(sources, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


class RowBlock:
    """A table opened for taking rows out of it; the arrays are views of the table, the rows are copies."""

    def __init__(self, table: pa.Table) -> None:
        self._prefix_lengths = table.column("prefix_length").to_numpy()
        self._margins, self._targets = (table.column(name).to_numpy() for name in ("margin", "target"))
        self._places = [table.column(name).to_numpy() for name in ("source", "row")]
        self._ids, self._lengths, self._ranks, self._ratings = (
            _Lists(table.column(name).combine_chunks()) for name in ("ids", "lengths", "ranks", "ratings")
        )

    def row(self, offset: int) -> TokenizedRow:
        """The row at a position of the table."""
        source, row = (int(column[offset]) for column in self._places)
        ranks, stored = self._ranks.at(offset).tolist(), self._ratings.at(offset).tolist()
        scores, attributes = stored[: len(ranks)], stored[len(ranks) :]
        return TokenizedRow(
            self._ids.at(offset).copy(),
            int(self._prefix_lengths[offset]),
            tuple(self._lengths.at(offset).tolist()),
            tuple(ranks),
            float(self._margins[offset]),
            (source, row),
            float(self._targets[offset]),
            () if all(map(math.isnan, scores)) else tuple(scores),
            tuple(attributes),
        )


class _Lists:
    """A column of lists of numbers, as views."""

    def __init__(self, column: pa.ListArray) -> None:
        self._values: npt.NDArray[Any] = column.values.to_numpy()
        self._starts: npt.NDArray[np.int32] = column.offsets.to_numpy()

    def at(self, position: int) -> npt.NDArray[Any]:
        return self._values[self._starts[position] : self._starts[position + 1]]


def _parsed(row: SourceRow, selection: Selection, labels: LabelRules) -> PreferenceRow | RowError:
    if isinstance(row.content, RowError):
        return row.content
    try:
        parsed = parse_row(row.content, labels)
    except RowError as error:
        return error
    return selection.refusal(parsed) or parsed


def _is_held_out(entry: PreferenceRow | RowError) -> bool:
    return isinstance(entry, RowError) and entry.reason == HELD_OUT


def _record(
    row: SourceRow,
    parsed: PreferenceRow | RowError | None,
    outcome: TokenizedRow | RowError | None,
    form: str | None,
) -> dict[str, Any]:
    assert outcome is not None
    place = {"source": row.source, "row": row.number, "form": form}
    if isinstance(outcome, TokenizedRow):
        sequences = outcome.sequences
        tokens, attention = distinct_cost(sequences, outcome.prefix_length)
        return {
            **place,
            "ids": outcome.ids,
            "prefix_length": outcome.prefix_length,
            "lengths": outcome.lengths,
            "ranks": outcome.ranks,
            "margin": outcome.margin,
            "target": outcome.target,
            "ratings": _stored_ratings(outcome),
            "tokens": tokens,
            "attention": attention,
            "prefix_keys": prefix_keys(outcome.ids, outcome.prefix_length).tobytes(),
            "text_keys": [text_key(ids) for ids in sequences],
            "prompt": _prompt_key(parsed, outcome),
            "group": _group_of(row.content),
            "digest": _digest(outcome),
        }
    return {
        **place,
        "ids": [],
        "prefix_length": 0,
        "lengths": [],
        "ranks": [],
        "margin": 0.0,
        "target": 1.0,
        "ratings": [],
        "tokens": 0,
        "attention": 0,
        "prefix_keys": bytes(_KEYS_SIZE),
        "text_keys": [],
        "prompt": 0,
        "group": None,
        "digest": bytes(DIGEST_SIZE),
        "reason": outcome.reason,
        "message": f"{row.where}: {outcome}",
        "raw": raw_text(row),
    }


def _prompt_key(parsed: PreferenceRow | RowError | None, row: TokenizedRow) -> int:
    """64 bits: of the prompt's text, or of what the completions share where there is no text."""
    if not isinstance(parsed, PreferenceRow) or parsed.ids is not None:
        return text_key(row.ids[: row.prefix_length])
    content = prompt_of(parsed).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _group_of(content: Any) -> str | None:
    named = content if isinstance(content, Mapping) else {}
    return next((named[name] for name in GROUP_COLUMNS if isinstance(named.get(name), str)), None)


def _digest(row: TokenizedRow) -> bytes:
    content = hashlib.blake2b(row.ids.tobytes(), digest_size=DIGEST_SIZE)
    content.update(f"{row.prefix_length},{row.lengths},{row.ranks},{row.margin!r}".encode())
    if row.target != 1 or row.ratings:
        content.update(f",{row.target!r},{row.ratings!r}".encode())
    if row.attributes:
        content.update(f",{row.attributes!r}".encode())
    return content.digest()


def raw_text(row: SourceRow) -> str:
    """A row as it is kept where it is refused: its line, or its content as JSON, cut at 4 kB."""
    if row.line is not None:
        return row.line[:RAW_LIMIT].decode("utf-8", "replace").rstrip("\r\n")
    return json.dumps(row.content, default=repr)[:RAW_LIMIT]
