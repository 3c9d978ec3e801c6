"""[RAY] The scores of a tokenized set: computed here, or by a pool of Ray Data's actors; kept as they come.

A set is scored in chunks of `ROWS_PER_CHUNK` consecutive rows. Where there is a directory to keep them in,
each chunk's scores are written as soon as they are known, under a name that tells the model, the rows and
the chunk: what was cut off computes the missing ones only. A score does not depend on its chunk (< 1e-5).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.config import RewardConfig
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import RayrmError, writing
from rayrm.model.reward_model import LoadedModel, load_saved
from rayrm.train.attributes import reopen_attributes
from rayrm.train.evaluation import RowSet, Scores, scorer_of

ROWS_PER_CHUNK = 256
Progress = Callable[[str, int, int], None]
_OF_MODEL = (".safetensors", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a loaded model's sets are scored; see `evaluate` for the settings."""

    loaded: LoadedModel
    model: Path
    num_workers: int = 0
    keep: Path | None = None
    rows_per_chunk: int = ROWS_PER_CHUNK

    def scores(self, rows: TokenizedSet, name: str, on_progress: Progress | None = None) -> Scores:
        """The scores of all completions, in the index's order, `[N]`; with attributes `[N, 1 + A]`."""
        chunks = list(range(0, rows.num_rows, self.rows_per_chunk))
        kept = None if self.keep is None else self.keep / self._key(rows)
        found = {} if kept is None else _kept(kept, chunks)
        done = sum(self._chunk(rows, chunk).num_rows for chunk in found)
        if on_progress is not None and done:
            on_progress(name, done, rows.num_rows)
        missing = [chunk for chunk in chunks if chunk not in found]
        for chunk, scores in self._computed(rows, missing):
            found[chunk] = scores
            if kept is not None:
                _keep(kept, chunk, scores)
            done += self._chunk(rows, chunk).num_rows
            if on_progress is not None:
                on_progress(name, done, rows.num_rows)
        return np.concatenate([found[chunk] for chunk in chunks]) if chunks else np.zeros(0)

    def forget(self) -> None:
        """Delete what was kept: everything is scored."""
        if self.keep is not None:
            shutil.rmtree(self.keep, ignore_errors=True)

    def _computed(self, rows: TokenizedSet, chunks: list[int]) -> Iterator[tuple[int, Scores]]:
        if not chunks:
            return
        if self.num_workers == 0:
            with _scorer(self.loaded, rows) as scores_of:
                for chunk in chunks:
                    yield chunk, scores_of(self._chunk(rows, chunk))
            return
        yield from self._computed_by_workers(rows, chunks)

    def _computed_by_workers(self, rows: TokenizedSet, chunks: list[int]) -> Iterator[tuple[int, Scores]]:
        import ray

        from rayrm.data.ingest import quiet_context
        from rayrm.own_ray import scorer_resources

        items = [{"chunk": chunk, "num_rows": self._chunk(rows, chunk).num_rows} for chunk in chunks]
        with quiet_context():
            scored = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                ChunkScorer,
                # In a list a reference stays one: an actor's own arguments cannot be lost with the store.
                fn_constructor_args=(str(self.model), [ray.put(rows)]),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=min(self.num_workers, len(chunks))),
                **scorer_resources(self.num_workers),
            )
            try:
                for batch in scored.iter_batches(batch_size=None, prefetch_batches=0):
                    for chunk, scores in zip(batch["chunk"], batch["scores"], strict=True):
                        yield int(chunk), pickle.loads(scores)
            except ray.exceptions.RayTaskError as error:
                raise RayrmError(
                    f"a worker that scores failed: {_cause(error)}. What it said stands above, and what was "
                    "scored is kept where there is an `--output`."
                ) from error

    def _chunk(self, rows: TokenizedSet, first: int) -> _Chunk:
        return _Chunk(rows, first, min(self.rows_per_chunk, rows.num_rows - first))

    def _key(self, rows: TokenizedSet) -> str:
        """What the scores are of: the model's files as they are now, and the rows."""
        files = sorted(file for file in self.model.rglob("*") if file.is_file() and file.suffix in _OF_MODEL)
        told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        content = f"{told} {rows.report.fingerprint} {self.rows_per_chunk}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class ChunkScorer:
    """An actor of the pool: the model in its memory; chunks by their first row -> their scores, pickled."""

    def __init__(self, model: str, rows: Sequence[Any]) -> None:
        import ray

        loaded = load_saved(model)
        reopen_attributes(loaded.model, Path(model))
        self._rows: TokenizedSet = ray.get(rows[0])
        self._open = ExitStack()  # as long as the actor lives
        self._scores_of = self._open.enter_context(_scorer(loaded, self._rows))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunks = zip(batch["chunk"].tolist(), batch["num_rows"].tolist(), strict=True)
        scores = [pickle.dumps(self._scores_of(_Chunk(self._rows, *chunk))) for chunk in chunks]
        return {"chunk": batch["chunk"], "scores": scores}


class _Chunk:
    """The rows of a set from `first` on."""

    def __init__(self, rows: TokenizedSet, first: int, num_rows: int) -> None:
        self._rows, self._first, self.num_rows = rows, first, num_rows
        self.index: RowIndex = rows.index.take(first + np.arange(num_rows))

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]:
        return self._rows.fetch(self._first + np.asarray(rows))

    def name_of(self, row: TokenizedRow) -> str:
        return self._rows.name_of(row)


def _cause(error: Any) -> str:
    """What the user's code raised: the last line of the first traceback."""
    lines = str(error).partition("The above exception was the direct cause")[0].splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)


def _scorer(loaded: LoadedModel, rows: TokenizedSet) -> AbstractContextManager[Callable[[RowSet], Scores]]:
    # Scores are float32's, as those of `RewardModel` and of the service are.
    return scorer_of(loaded.model, RewardConfig(bf16=False), longest=int(rows.index.lengths.max()))


def _kept(directory: Path, chunks: list[int]) -> dict[int, Scores]:
    """The scores of the chunks that were computed before, by their first row."""
    files = {chunk: directory / f"{chunk}.npy" for chunk in chunks}
    return {chunk: np.load(file) for chunk, file in files.items() if file.is_file()}


def _keep(directory: Path, chunk: int, scores: Scores) -> None:
    file = directory / f"{chunk}.npy"
    with writing(file):
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f".{chunk}.{os.getpid()}.npy"
        np.save(aside, scores)
        aside.replace(file)
