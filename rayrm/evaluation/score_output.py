"""Scored rows -> a file, by its name: jsonl, jsonl.gz, or parquet with the types of its inputs.

Rows stream: parquet is written in row groups of about 32 MiB. Its columns have one type each, known before
the first row is written: the inputs' own where all are parquet, else found by one more reading of the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm.data.files import file_errors, open_seekable
from rayrm.data.pieces import PARQUET_SUFFIXES, Piece, Shard, kind_of
from rayrm.data.sources import read_work
from rayrm.errors import ConfigError, DataError
from rayrm.serve.score_file import write_lines

_ROWS_PER_TABLE = 1000
_BYTES_PER_ROW_GROUP = 32 * 2**20
_OTHERS = (".zst", ".arrow", ".feather", ".csv")


def is_parquet(output: Path) -> bool:
    """Whether a file of this name is to be parquet; others are jsonl. ConfigError: what is not written."""
    if output.suffix in _OTHERS:
        raise ConfigError(
            f"--output ({output}) has the ending {output.suffix}, which is not written. Type a name that "
            "ends in .jsonl, .jsonl.gz or .parquet."
        )
    if output.is_dir():
        raise ConfigError(f"--output ({output}) is a directory. Type a file in it: {output / 'scored.jsonl'}")
    return output.suffix == ".parquet"


def write_output(rows: Iterable[Mapping[str, Any]], path: Path, schema: pa.Schema | None) -> int:
    """Write the rows, as parquet where there is a schema; returns their number."""
    if schema is None:
        return write_lines(rows, path, compressed=path.suffix == ".gz")
    num_rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        held: list[pa.Table] = []
        for table in _tables(rows, schema):
            held.append(table)
            num_rows += len(table)
            if sum(part.nbytes for part in held) >= _BYTES_PER_ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))
    return num_rows


def input_schema(work: Sequence[Piece]) -> pa.Schema:
    """The columns of all rows of these pieces. DataError: one that has values of several types."""
    try:
        return pa.unify_schemas(_own_schemas(work) or _found_schemas(work), promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"the inputs have a column of several types ({error}), which parquet can't hold. Write --output "
            "FILE.jsonl, or convert the column."
        ) from error


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    reader = iter(rows)
    while part := list(itertools.islice(reader, _ROWS_PER_TABLE)):
        try:
            yield pa.Table.from_pylist(part, schema)
        except pa.ArrowException as error:
            raise DataError(
                f"rows cannot be written as parquet ({error}). Write --output FILE.jsonl, or convert the "
                "column."
            ) from error


def _own_schemas(work: Sequence[Piece]) -> list[pa.Schema] | None:
    """The inputs' own, where all are parquet and no column holds JSON as text."""
    schemas: dict[str, pa.Schema] = {}
    for piece in work:
        if not isinstance(piece, Shard) or not kind_of(piece.path).endswith(PARQUET_SUFFIXES):
            return None
        if piece.path not in schemas:
            with file_errors(piece), closing(open_seekable(piece)) as opened:
                schemas[piece.path] = pq.read_schema(opened).remove_metadata()
    if any(isinstance(field.type, pa.BaseExtensionType) for schema in schemas.values() for field in schema):
        return None
    return list(schemas.values())


def _found_schemas(work: Sequence[Piece]) -> list[pa.Schema]:
    """The types that Arrow finds for the rows, so many of them at a time; each that is new."""
    known: list[pa.Schema] = []
    for piece in work:
        contents = (row.content for row in read_work(piece) if isinstance(row.content, Mapping))
        while part := list(itertools.islice(contents, _ROWS_PER_TABLE)):
            names = dict.fromkeys(name for row in part for name in row)
            found = pa.schema([(name, pa.array([row.get(name) for row in part]).type) for name in names])
            if found not in known:
                known.append(found)
    return known
