"""Benchmarks in their own shapes: which one rows are of, what of them is scored, and the benchmark's numbers.

RewardBench and RewardBench 2, RM-Bench, JudgeBench, LLMBar, PPE and best-of-N curves, each defined in its own
module. Rows come from wherever data comes from (`rayrm.serve.score_file.read_rows`); this reads no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrm.data.row_index import Floats
from rayrm.data.tokenize import TextForm
from rayrm.errors import DataError, ScoreError
from rayrm.evaluation import best_of_n, rewardbench, rewardbench2, rm_bench
from rayrm.evaluation.benchmark_result import BenchmarkResult
from rayrm.evaluation.entries import BenchmarkRow, Entry, inputs_of
from rayrm.evaluation.labelled_pairs import JUDGEBENCH, LLMBAR, PPE_HUMAN
from rayrm.serve.score_file import Row, Score

ROWS_PER_CALL = 64
"""Rows whose completions are scored together, so that those of a prompt share its computation."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark's shape: how its rows look, what an entry of one is, and its numbers from scores."""

    recognises: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[BenchmarkRow], Entry | None]
    measure: Callable[[Sequence[Entry], Sequence[Floats]], BenchmarkResult]


BENCHMARKS: dict[str, Benchmark] = {
    rewardbench2.NAME: Benchmark(rewardbench2.recognises, rewardbench2.parse, rewardbench2.measure),
    rm_bench.NAME: Benchmark(rm_bench.recognises, rm_bench.parse, rm_bench.measure),
    rewardbench.NAME: Benchmark(rewardbench.recognises, rewardbench.parse, rewardbench.measure),
    **{
        pairs.name: Benchmark(pairs.recognises, pairs.parse, pairs.measure)
        for pairs in (JUDGEBENCH, LLMBAR, PPE_HUMAN)
    },
    best_of_n.PPE_NAME: Benchmark(best_of_n.recognises_ppe, best_of_n.parse_ppe, best_of_n.measure_ppe),
    best_of_n.NAME: Benchmark(best_of_n.recognises, best_of_n.parse, best_of_n.measure),
}
"""By name, in the order in which they are tried on a row."""


def recognise(row: Mapping[str, Any]) -> str | None:
    """The benchmark whose shape a source's first row has, or None: a preference row as any other."""
    return next((name for name, each in BENCHMARKS.items() if each.recognises(row)), None)


def parse_entries(name: str, rows: Iterable[Row]) -> tuple[list[Entry], int]:
    """The entries of a benchmark's rows, in order, and how many rows were left out, since none of them wins.

    Raises:
        DataError: a name that is no benchmark's; a row that is not of its shape, named; no entry.
    """
    benchmark = _of_name(name)
    entries, num_without = [], 0
    for where, content in rows:
        if not isinstance(content, Mapping):
            raise DataError(f"{where}: the row is {type(content).__name__}; one of {name} is an object.")
        entry = benchmark.parse(BenchmarkRow(name, where, content))
        if entry is None:
            num_without += 1
        else:
            entries.append(entry)
    if not entries:
        raise DataError(f"no row of {name} is left to score ({num_without} have no winner); give more rows.")
    return entries, num_without


def run_benchmark(name: str, rows: Iterable[Row], score: Score, *, text_form: TextForm) -> BenchmarkResult:
    """The numbers of one benchmark for the model behind `score`.

    Args:
        name: one of `BENCHMARKS`.
        rows: (where it stands, content), as `read_rows` gives them.
        score: texts -> one score each, in order, such as `RewardModel.score_inputs`.
        text_form: the model's.

    Raises:
        DataError: as `parse_entries`, and for a row that the text form cannot express.
        ScoreError: a row that the model cannot score, named.
    """
    entries, num_without = parse_entries(name, rows)
    return measure(name, entries, score_entries(entries, score, text_form), num_without)


def measure(
    name: str, entries: Sequence[Entry], scores: Sequence[Floats], num_without_winner: int = 0
) -> BenchmarkResult:
    """The numbers of R scored entries; `scores`: of each one's completions, R arrays `[K]`."""
    result = _of_name(name).measure(entries, scores)
    if not num_without_winner:
        return result
    return BenchmarkResult(
        result.name,
        result.source,
        result.metrics | {"num_without_winner": float(num_without_winner)},
        result.tables,
        (*result.notes, f"{num_without_winner} rows have no winner and are left out"),
    )


def score_entries(entries: Sequence[Entry], score: Score, text_form: TextForm) -> list[Floats]:
    """The scores of each entry's completions, arrays `[K]`, in order. Errors as `run_benchmark`."""
    scores: list[Floats] = []
    reader = iter(entries)
    while chunk := list(itertools.islice(reader, ROWS_PER_CALL)):
        inputs = [inputs_of(entry, text_form) for entry in chunk]
        try:
            flat = iter(score([each for own in inputs for each in own]))
        except ScoreError:
            # Which row was it? Only this failing chunk is scored again, row by row.
            for entry, own in zip(chunk, inputs, strict=True):
                try:
                    score(own)
                except ScoreError as error:
                    raise ScoreError(f"{entry.where}: {error}") from error
            raise
        scores.extend(np.fromiter(itertools.islice(flat, len(own)), np.float64, len(own)) for own in inputs)
    return scores


def _of_name(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise DataError(f"{name!r} is no benchmark; give one of {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
