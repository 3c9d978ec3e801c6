"""`datasets` as a source: hub names, streams with shards of their own, directories that it saved."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrm.data.pieces import Columns, SourceRow, StreamShard
from rayrm.errors import DataError


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
    import dill

    number = stream.num_shards
    names = [name] if number == 1 else [f"{name}/shard-{index}" for index in range(number)]
    pieces = []
    for index, shard_name in enumerate(names):
        try:
            # By value: a worker cannot import a function of the caller's script, which pickle would refer to.
            pickled = dill.dumps(stream.shard(num_shards=number, index=index), recurse=True)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError, ValueError) as error:
            raise DataError(
                f"{name} ({type(stream).__name__}) cannot be sent to other processes "
                f"({type(error).__name__}: {error}); make its generator open what it needs itself, or give a "
                "file"
            ) from error
        pieces.append(StreamShard(first_source + index, shard_name, pickled, columns))
    return pieces


def read_stream(piece: StreamShard) -> Iterator[SourceRow]:
    """The rows of one shard of a stream. Raises `DataError` where the stream does."""
    import datasets

    stream = pickle.loads(piece.pickled)
    number = 0
    try:
        for number, content in enumerate(stream):
            yield SourceRow(piece.source, number, f"{piece.name}[{number}]", content)
    except (OSError, EOFError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{piece.name} cannot be read beyond row {number} ({type(error).__name__}: {error}); correct the "
            "stream's files or its generator, or give what can be read"
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
