"""`datasets` as a source: hub names, datasets on disk, streams by their shards, directories that it saved."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rayrm.data.files import ROWS_PER_CHUNK
from rayrm.data.pieces import Columns, DatasetPart, SourceRow, StreamShard
from rayrm.errors import DataError

MOST_PARTS = 1024


def load_hub_dataset(name: str) -> Any:
    """The rows of `org/name` or `org/name:split` (default split: `train`), by `datasets.load_dataset`."""
    return _load(name, streaming=False)


def hub_stream(name: str) -> Any:
    """The same as a `datasets.IterableDataset`: its files are read where and when its rows are needed."""
    return _load(name, streaming=True)


def _load(name: str, *, streaming: bool) -> Any:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train", streaming=streaming)
    # Not found, offline, refused; a bad split; sets that need a script.
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} is no path here and the hub gives no such dataset ({type(error).__name__}: {error}); "
            "correct the path, or the name and split (org/name:split); offline, give a local file"
        ) from error


def is_dataset(source: Any) -> bool:
    """Whether it is a dataset of `datasets`, which is not imported for the question."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, (datasets.Dataset, datasets.IterableDataset))


def is_stream(source: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.IterableDataset)


def stream_shards(first_source: int, name: str, stream: Any, columns: Columns) -> list[StreamShard]:
    """The stream's own shards as pieces, each a source of its own: rows are counted within the shard."""
    number = stream.num_shards
    names = [name] if number == 1 else [f"{name}/shard-{index}" for index in range(number)]
    return [
        StreamShard(first_source + index, own, _pickled(name, stream, number_of=(index, number)), columns)
        for index, own in enumerate(names)
    ]


def stream_start(source: int, name: str, stream: Any, columns: Columns, num_rows: int) -> StreamShard:
    """The first `num_rows` rows of a stream, over its shards, as one piece: which they are, reading tells."""
    return StreamShard(source, name, _pickled(name, stream), columns, num_rows)


def dataset_parts(
    source: int, name: str, dataset: Any, columns: Columns, limit: int | None
) -> list[DatasetPart] | None:
    """The first `limit` rows of a dataset as parts that follow from its number of rows.

    None: rows of it, or the order of its rows, lie in memory, and the parts would carry them.
    """
    if _is_held(dataset.data) or _is_held(dataset._indices):
        return None
    num_rows = len(dataset) if limit is None else min(limit, len(dataset))
    size = max(ROWS_PER_CHUNK, -(-num_rows // MOST_PARTS))
    parts = []
    for start in range(0, num_rows, size):
        part = dataset.select(range(start, min(start + size, num_rows)))
        pickled = _pickled(name, part)
        parts.append(DatasetPart(source, name, start, len(part), part.data.nbytes, pickled, columns))
    return parts


def _is_held(table: Any) -> bool:
    """Whether a table of `datasets` lies in memory, or part of it: such a part is pickled whole."""
    from datasets.table import ConcatenationTable, InMemoryTable

    if isinstance(table, ConcatenationTable):
        return any(_is_held(block) for row in table.blocks for block in row)
    return isinstance(table, InMemoryTable)


def _pickled(name: str, rows: Any, *, number_of: tuple[int, int] | None = None) -> bytes:
    """A dataset or a stream, or one of its shards (`number_of`: which, of how many), for other processes."""
    import dill

    try:
        if number_of is not None:
            rows = rows.shard(index=number_of[0], num_shards=number_of[1])
        # By value: a worker cannot import a function of the caller's script, which pickle would refer to.
        pickled: bytes = dill.dumps(rows, recurse=True)
        return pickled
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise DataError(
            f"{name} ({type(rows).__name__}) cannot be sent to other processes "
            f"({type(error).__name__}: {error}); make its generator open what it needs itself, or give a "
            "file"
        ) from error


def read_stream(piece: StreamShard) -> Iterator[SourceRow]:
    """The rows of one shard of a stream. Raises `DataError` where the stream does."""
    yield from _read(piece, 0, "correct the stream's files or its generator, or give what can be read")


def read_part(piece: DatasetPart) -> Iterator[SourceRow]:
    """The rows of a part of a dataset. Raises `DataError` where its files cannot be read here."""
    yield from _read(
        piece, piece.start, 'let every node see its files, or set data.mode="indexed", which sends the rows'
    )


def _read(piece: StreamShard | DatasetPart, first: int, remedy: str) -> Iterator[SourceRow]:
    import datasets

    number = first
    rows = None
    try:
        rows = pickle.loads(piece.pickled)
        stop = piece.stop if isinstance(piece, StreamShard) else None
        for number, content in enumerate(islice(rows, stop), first):
            yield SourceRow(piece.source, number, f"{piece.name}[{number}]", content)
    except (ImportError, AttributeError) as error:
        if rows is not None:
            raise
        raise DataError(
            f"{piece.name} cannot be read in another process ({error}); put what makes its rows into a "
            "module that every worker can import, or write the rows to a file"
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{piece.name} cannot be read beyond row {number} ({type(error).__name__}: {error}); {remedy}"
        ) from error


def saved_files(directory: Path) -> list[Path] | None:
    """The files of a directory that `save_to_disk` wrote, in their order; None for another directory."""
    if (directory / "dataset_dict.json").is_file():
        splits = _saved_json(directory / "dataset_dict.json")["splits"]
        raise DataError(
            f"{directory} holds the splits {', '.join(splits)}; one is needed here; type "
            f"{directory / splits[0]}"
        )
    state = directory / "state.json"
    if not state.is_file() or not (directory / "dataset_info.json").is_file():
        return None
    saved = _saved_json(state)
    if saved.get("_indices_files") or saved.get("_indices_data_files"):
        raise DataError(
            f"{directory} is saved with an order of its own beside the rows; save it again with "
            "dataset.flatten_indices().save_to_disk(..)"
        )
    return [directory / entry["filename"] for entry in saved["_data_files"]]


def _saved_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); save the dataset again") from error
    if not isinstance(content, dict) or not ({"splits", "_data_files"} & set(content)):
        raise DataError(f"{path} is not what `save_to_disk` writes; save the dataset again")
    return content
