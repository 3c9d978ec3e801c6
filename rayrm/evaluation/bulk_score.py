"""[RAY] Rows of any number of files, of any size -> a file of scored rows, best ones or pairs; can be killed.

The inputs are cut into chunks of rows; each is scored, here or by a pool of Ray Data's actors that hold a
`RewardModel` each, and its scores are kept at once in `score_ledger`. When all are, the rows are read once
more, in order, and written beside their scores: aside, then renamed, so that the output is whole or absent.
Memory holds chunks and the places of finished ones, whatever the size of a file. Cost beside scoring: the
inputs are read twice (three times for parquet out of jsonl).
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrm.data.blocks import Refusal, raw_text
from rayrm.data.pieces import Piece, Shard, SourceRow, StreamShard
from rayrm.data.quarantine import RefusalWatch, write_quarantine
from rayrm.data.sources import SourcePlan, plan_sources, read_work
from rayrm.data.tokenize import TextInput
from rayrm.errors import ClusterError, DataError, RayrmError, RowError, RunDirectoryError
from rayrm.evaluation.best_of import Selection
from rayrm.evaluation.score_chunks import Chunk, chunks_of
from rayrm.evaluation.score_ledger import Entry, ScoreLedger, open_ledger
from rayrm.evaluation.score_output import input_schema, is_parquet, write_output
from rayrm.serve.registry import content_version
from rayrm.serve.request import Truncation
from rayrm.serve.score_file import Score, score_each

_FORMAT = 1
"""Another one does not go on with what this one began: how rows are cut into chunks is part of it."""
_NOT_SCORED = "not-scored"
_READERS = 2
OnProgress = Callable[[int, int], None]
"""Told (rows done, how many of them by earlier processes) after each chunk."""


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How rows are scored, in any process: by which model, and what is done with which texts."""

    model: str
    rendered: bool = False
    truncation: Truncation | None = None
    column: str = "score"

    def load(self) -> Score:
        """The model in this process, as a function of inputs."""
        from rayrm.serve.scorer import RewardModel

        model = RewardModel.from_pretrained(self.model)

        def score(inputs: list[TextInput]) -> list[float]:
            return model.score_inputs(inputs, truncation=self.truncation)

        return score


@dataclass(frozen=True, slots=True)
class BulkSummary:
    """How many rows were scored, written and refused, and how many groups were left out, by reason."""

    num_scored: int
    num_written: int
    num_refused: int
    dropped: Counter[str] = field(default_factory=Counter)


def score_files(
    sources: Sequence[str],
    output: Path,
    settings: ScoreSettings,
    *,
    selection: Selection | None = None,
    max_bad_row_fraction: float | None = None,
    num_workers: int = 0,
    address: str | None = None,
    on_progress: OnProgress = lambda done, before: None,
) -> BulkSummary:
    """Score all rows of `sources`, in order, into `output`; goes on where the same call was cut off.

    `num_workers`: actors that score (0: this process does, without Ray), each with a GPU where the cluster
    has some, else a CPU. `max_bad_row_fraction`: rows that cannot be scored are left out, and written to
    `OUTPUT.refused.jsonl`, up to this share of each source (None: the first one ends it).

    Raises:
        DataError, ScoreError: an input, or a row, that cannot be read or scored; too many of them.
        ConfigError: an output of no known kind, or a column that is there already.
        RunDirectoryError: unfinished scores of another command, or of one that still runs.
        ClusterError: more workers than the cluster has room for, or workers that failed.
    """
    selection = selection or Selection(column=settings.column)
    parquet = is_parquet(output)
    plan = plan_sources(list(sources), max_rows=None, name="the input", contiguous=True)
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "model": content_version(settings.model),
        "inputs": [list(fact) for fact in dict.fromkeys(map(_identity, plan.work))],
        "options": _options(settings, selection),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with open_ledger(output, facts) as ledger:
        tally = _Tally(plan, ledger, max_bad_row_fraction, on_progress)
        tally.replay()
        with _writing(ledger.home):
            if num_workers:
                entries = _scored_by_actors(plan, ledger, settings, num_workers, address)
            else:
                entries = _scored_here(plan, ledger, settings)
            with closing(entries):  # where a row ends it, the actors end too
                for entry in entries:
                    tally.add(entry)
            tally.finish()
            return _write(plan, ledger, output, selection, parquet=parquet)


def _identity(piece: Piece) -> tuple[str, str]:
    """What a piece's rows are known by: of a file its path, size and date, else their content."""
    assert not isinstance(piece, StreamShard)  # paths and hub names are planned as files and rows
    if isinstance(piece, Shard):
        return piece.path, f"{piece.size} bytes of {piece.mtime_ns}"
    return piece.name, f"rows from {piece.start}: {hashlib.sha256(piece.pickled).hexdigest()}"


def _options(settings: ScoreSettings, selection: Selection) -> dict[str, Any]:
    return {
        "--rendered": settings.rendered,
        "--truncation": settings.truncation,
        "--column": settings.column,
        "--best-of": selection.kind == "best-of",
        "--pairs": selection.kind == "pairs",
        "--min-score": selection.min_score,
        "--min-margin": selection.min_margin,
    }


class _Tally:
    """Takes finished chunks in any order: keeps them, counts them, and ends a scoring that is refused."""

    def __init__(
        self, plan: SourcePlan, ledger: ScoreLedger, max_bad: float | None, on_progress: OnProgress
    ) -> None:
        self._work = plan.work
        self._ledger = ledger
        self._watch = None if max_bad is None else RefusalWatch("the input", plan.group_names, max_bad)
        self._on_progress = on_progress
        self._num_rows = self._num_before = 0

    def replay(self) -> None:
        """Count what an earlier process has kept."""
        for entry in self._ledger.load():
            self._num_before += len(entry.scores)
            self._count(entry)

    def add(self, entry: Entry) -> None:
        if self._watch is None:
            self._check(entry)  # nothing is kept of a chunk that ends it
        if self._ledger.add(entry):
            self._count(entry)

    def finish(self) -> None:
        if self._watch is not None and self._num_rows:
            self._watch.finish()

    def _count(self, entry: Entry) -> None:
        self._num_rows += len(entry.scores)
        self._on_progress(self._num_rows, self._num_before)
        if self._watch is None:
            self._check(entry)
            return
        source = self._work[entry.piece].source
        refusals = [
            Refusal(source, place, reason, message, "") for place, (reason, message) in entry.refused.items()
        ]
        self._watch.add({source: len(entry.scores)}, refusals)

    @staticmethod
    def _check(entry: Entry) -> None:
        for _, message in entry.refused.values():
            raise DataError(
                f"{message} (To leave out such rows, up to a share of them: --max-bad-row-fraction 0.01)"
            )


def _scored_here(
    plan: SourcePlan, ledger: ScoreLedger, settings: ScoreSettings
) -> Generator[Entry, None, None]:
    score: Score | None = None
    for number, piece in enumerate(plan.work):
        if ledger.is_done(number):
            continue
        for chunk in chunks_of(number, read_work(piece)):
            if (number, chunk.number) not in ledger:
                score = score or settings.load()
                yield _entry(chunk, score, settings)


def _entry(chunk: Chunk, score: Score, settings: ScoreSettings) -> Entry:
    rows = [(row.where, row.content) for row in chunk.rows]
    outcomes = score_each(rows, score, rendered=settings.rendered, column=settings.column)
    refused = {}
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            content = chunk.rows[place].content
            reason = content.reason if isinstance(content, RowError) else _NOT_SCORED
            refused[place] = (reason, str(outcome))
    scores = [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]
    return Entry(chunk.piece, chunk.number, chunk.is_last, scores, refused)


def _scored_by_actors(
    plan: SourcePlan, ledger: ScoreLedger, settings: ScoreSettings, num_workers: int, address: str | None
) -> Generator[Entry, None, None]:
    """Chunks as a pool of actors has scored them, in whatever order.

    Reading is an operator of its own (no CPU of its own, and so not fused into the actors): the rows of one
    large piece, such as a compressed file, are scored by all of them.
    """
    todo = [
        {"work": pickle.dumps((number, piece, ledger.chunks_done(number)))}
        for number, piece in enumerate(plan.work)
        if not ledger.is_done(number)
    ]
    if not todo:
        return
    import ray

    from rayrm.data.ingest import quiet_context
    from rayrm.own_ray import join_cluster, scorer_resources

    join_cluster(address)
    resources = scorer_resources(num_workers)
    # A block of one byte: each chunk travels by itself, to the actor that is free next.
    with quiet_context(block_bytes=1):
        chunks = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _read_chunks,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(todo))),
        )
        scored = chunks.map_batches(
            _ScoringActor,
            fn_constructor_args=(settings,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            **resources,
        )
        try:
            for bundle in scored.iter_internal_ref_bundles():
                for table in ray.get(bundle.block_refs):
                    for line in table.column("entry").to_pylist() if len(table) else []:
                        if line[:1] != b"{":
                            raise pickle.loads(line)
                        yield Entry.of_line(line)
        except ray.exceptions.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise ClusterError(
                f"scoring by {num_workers} workers failed: {' '.join(last)} What is scored is kept: type the "
                "same command to go on."
            ) from error


def _read_chunks(batch: pa.Table) -> Iterator[pa.Table]:
    """The chunks of pieces that are not finished, pickled; an error that ends the reading in their place."""
    for work in batch.column("work").to_pylist():
        number, piece, done = pickle.loads(work)
        try:
            for chunk in chunks_of(number, read_work(piece)):
                if chunk.number not in done:
                    rows = [SourceRow(row.source, row.number, row.where, row.content) for row in chunk.rows]
                    told = Chunk(number, chunk.number, rows, chunk.is_last)
                    yield pa.table({"chunk": [pickle.dumps(told)]})
        except DataError as error:
            yield pa.table({"chunk": [pickle.dumps(error)]})


class _ScoringActor:
    """A process of Ray's with a model of its own: chunks -> lines of the ledger, or an error that ends it."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._score = settings.load()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for pickled in batch.column("chunk").to_pylist() if len(batch) else []:
            chunk = pickle.loads(pickled)
            try:
                if isinstance(chunk, Exception):
                    raise chunk
                line = _entry(chunk, self._score, self._settings).line()
            except RayrmError as error:
                line = pickle.dumps(error)
            yield pa.table({"entry": pa.array([line], pa.large_binary())})


@contextmanager
def _writing(home: Path) -> Iterator[None]:
    """What the disk refuses within the block ends it, and says what to type."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"`{home}` cannot be written ({error.strerror or error}). Free space there, then type the same "
            "command again: it goes on from what is scored."
        ) from error


def _write(
    plan: SourcePlan, ledger: ScoreLedger, output: Path, selection: Selection, *, parquet: bool
) -> BulkSummary:
    """The output, and the refused rows, from the inputs and their scores; then the ledger is gone."""
    schema = selection.schema(input_schema(plan.work)) if parquet else None
    aside, refused = ledger.home / f"whole{output.suffix}", ledger.home / "refused.jsonl"
    refused.unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    rows = _scored_rows(plan, ledger, selection, refused, counts)
    num_written = write_output(selection.of(rows, dropped), aside, schema)
    kept = refused_of(output)
    if counts["refused"]:
        refused.replace(kept)
    else:
        kept.unlink(missing_ok=True)  # of an earlier output of this name
    aside.replace(output)
    shutil.rmtree(ledger.home)
    return BulkSummary(counts["scored"], num_written, counts["refused"], dropped)


def refused_of(output: Path) -> Path:
    """Where the rows are written that an output leaves out because they cannot be scored."""
    return output.with_name(f"{output.name}.refused.jsonl")


def _scored_rows(
    plan: SourcePlan, ledger: ScoreLedger, selection: Selection, refused: Path, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """All rows with their scores, in order; those without one go to the file `refused`."""
    for number, piece in enumerate(plan.work):
        for chunk in chunks_of(number, read_work(piece)):
            entry = ledger.entry(number, chunk.number)
            if entry is None or len(entry.scores) != len(chunk.rows):
                raise DataError(
                    f"{chunk.rows[0].where}: the rows from here on are others than were scored; type the "
                    "same command again, and leave files as they are while they are read"
                )
            refusals = [
                Refusal(row.source, row.number, *entry.refused[place], raw_text(row))
                for place, row in enumerate(chunk.rows)
                if place in entry.refused
            ]
            if refusals:
                write_quarantine(refused, plan.names, refusals)
            counts["refused"] += len(refusals)
            for place, (row, score) in enumerate(zip(chunk.rows, entry.scores, strict=True)):
                if place not in entry.refused:
                    counts["scored"] += 1
                    assert isinstance(row.content, Mapping)  # or it would have been refused
                    yield {**row.content, selection.column: score}
