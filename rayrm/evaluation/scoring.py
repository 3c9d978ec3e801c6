"""[RAY] The scores of a tokenized set: computed here, or by a pool of Ray Data's actors; kept as they come.

A set is scored in chunks of `ROWS_PER_CHUNK` rows, those that begin alike together. Where there is a
directory to keep them in, each chunk's scores are written as soon as they are known, under a name that tells
the model, the rows and the chunk: what was cut off computes the missing ones only. A score does not depend
on its chunk (< 1e-5).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.config import RewardConfig
from rayrm.data.row_index import Places, RowIndex
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
        order = rows.index.alike_together
        chunks = {
            number: order[begin : begin + self.rows_per_chunk]
            for number, begin in enumerate(range(0, rows.num_rows, self.rows_per_chunk))
        }
        kept = None if self.keep is None else self.keep / self._key(rows)
        found = {} if kept is None else _kept(kept, chunks)
        done = sum(len(chunks[number]) for number in found)
        if on_progress is not None and done:
            on_progress(name, done, rows.num_rows)
        missing = {number: chunk for number, chunk in chunks.items() if number not in found}
        for number, scores in self._computed(rows, missing):
            found[number] = scores
            if kept is not None:
                _keep(kept, number, scores)
            done += len(chunks[number])
            if on_progress is not None:
                on_progress(name, done, rows.num_rows)
        if not chunks:
            return np.zeros(0)
        together = np.concatenate([found[number] for number in chunks])
        scores = np.empty_like(together)
        scores[rows.index.places(order)] = together
        return scores

    def forget(self) -> None:
        """Delete what was kept: everything is scored."""
        if self.keep is not None:
            shutil.rmtree(self.keep, ignore_errors=True)

    def _computed(self, rows: TokenizedSet, chunks: Mapping[int, Places]) -> Iterator[tuple[int, Scores]]:
        if not chunks:
            return
        if self.num_workers == 0:
            with _scorer(self.loaded, rows) as scores_of:
                for number, chunk in chunks.items():
                    yield number, scores_of(_Chunk(rows, chunk))
            return
        yield from self._computed_by_workers(rows, chunks)

    def _computed_by_workers(
        self, rows: TokenizedSet, chunks: Mapping[int, Places]
    ) -> Iterator[tuple[int, Scores]]:
        import ray

        from rayrm.data.ingest import quiet_context
        from rayrm.own_ray import scorer_resources

        items = [{"number": number, "rows": pickle.dumps(chunk)} for number, chunk in chunks.items()]
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
                    for number, scores in zip(batch["number"], batch["scores"], strict=True):
                        yield int(number), pickle.loads(scores)
            except ray.exceptions.RayTaskError as error:
                raise RayrmError(
                    f"a worker that scores failed: {_cause(error)}. What it said stands above, and what was "
                    "scored is kept where there is an `--output`."
                ) from error

    def _key(self, rows: TokenizedSet) -> str:
        """What the scores are of: the model's files as they are now, and the rows."""
        files = sorted(file for file in self.model.rglob("*") if file.is_file() and file.suffix in _OF_MODEL)
        told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        content = f"{told} {rows.report.fingerprint} {self.rows_per_chunk}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class ChunkScorer:
    """An actor of the pool, with the model in its memory: chunks of rows -> their scores, pickled."""

    def __init__(self, model: str, rows: Sequence[Any]) -> None:
        import ray

        loaded = load_saved(model)
        reopen_attributes(loaded.model, Path(model))
        self._rows: TokenizedSet = ray.get(rows[0])
        self._open = ExitStack()  # as long as the actor lives
        self._scores_of = self._open.enter_context(_scorer(loaded, self._rows))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunks = [_Chunk(self._rows, pickle.loads(rows)) for rows in batch["rows"]]
        return {"number": batch["number"], "scores": [pickle.dumps(self._scores_of(one)) for one in chunks]}


class _Chunk:
    """Some rows of a set, by their places in it."""

    def __init__(self, rows: TokenizedSet, places: Places) -> None:
        self._rows, self._places = rows, places
        self.num_rows = len(places)
        self.index: RowIndex = rows.index.take(places)

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]:
        return self._rows.fetch(self._places[np.asarray(rows)])

    def name_of(self, row: TokenizedRow) -> str:
        return self._rows.name_of(row)


def _cause(error: Any) -> str:
    """What the user's code raised: the last line of the first traceback."""
    lines = str(error).partition("The above exception was the direct cause")[0].splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)


def _scorer(loaded: LoadedModel, rows: TokenizedSet) -> AbstractContextManager[Callable[[RowSet], Scores]]:
    # Scores are float32's, as those of `RewardModel` and of the service are.
    return scorer_of(loaded.model, RewardConfig(bf16=False), longest=int(rows.index.lengths.max()))


def _kept(directory: Path, chunks: Iterable[int]) -> dict[int, Scores]:
    """The scores of the chunks that were computed before, by their numbers."""
    files = {number: directory / f"{number}.npy" for number in chunks}
    return {number: np.load(file) for number, file in files.items() if file.is_file()}


def _keep(directory: Path, number: int, scores: Scores) -> None:
    file = directory / f"{number}.npy"
    with writing(file):
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f".{number}.{os.getpid()}.npy"
        np.save(aside, scores)
        aside.replace(file)
