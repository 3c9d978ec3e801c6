"""Benchmarks as sets of an evaluation: their rows tokenized and scored as all others, and their own numbers.

A row keeps all its completions, also where they are equal or equally good: what a benchmark counts is its own
affair. Rows above the model's positions are left out, counted, and told in the benchmark's notes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from rayrm.data.packing import Ids
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.prefix_keys import text_key
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import TextForm, TokenizedRow, encode
from rayrm.data.tokenized_set import RowLabels, TokenizedSet
from rayrm.errors import DataError
from rayrm.evaluation.benchmark_result import BenchmarkResult
from rayrm.evaluation.benchmarks import measure, parse_entries, recognise
from rayrm.evaluation.entries import Entry, as_rows, inputs_of, ranks_of
from rayrm.model.reward_model import LoadedModel
from rayrm.serve.score_file import read_rows
from rayrm.train.evaluation import Scores


@dataclass(frozen=True, slots=True)
class BenchmarkSet:
    """A benchmark's rows, ready to be scored; `entries[r]` is row r."""

    name: str
    entries: list[Entry]
    text_form: TextForm
    rows: TokenizedSet
    labels: RowLabels
    num_without_winner: int
    num_too_long: int

    def preferences(self, num_rows: int) -> list[PreferenceRow]:
        """The first rows as preferences of the model's text form."""
        return [parse_row(row) for row in as_rows(self.entries[:num_rows], self.text_form)]

    def measured(self, scores: Scores) -> BenchmarkResult:
        """The benchmark's numbers from the scores of all completions, `[N]`."""
        of_rows = np.split(scores, self.rows.index.first[1:-1])
        result = measure(self.name, self.entries, of_rows, self.num_without_winner)
        if not self.num_too_long:
            return result
        note = f"{self.num_too_long} rows are above the model's positions and are left out"
        return dataclasses.replace(result, notes=(*result.notes, note))


def benchmark_set(
    source: Any, loaded: LoadedModel, name: str, max_rows: int | None = None
) -> BenchmarkSet | None:
    """The source as a benchmark, told by its first row; None for any other, and for what is no file or name.

    Raises DataError for a row that is not of the benchmark's shape, named, and where no row is left.
    """
    if not isinstance(source, str):
        return None
    plan = plan_sources(source, max_rows=1, name=name, streaming=True)
    first = next((row.content for piece in plan.work for row in read_work(piece)), None)
    benchmark = recognise(first) if isinstance(first, Mapping) else None
    if benchmark is None:
        return None
    entries, num_without = parse_entries(benchmark, islice(read_rows(source), max_rows))
    inputs = [inputs_of(entry, loaded.text_form) for entry in entries]
    ids = iter(encode(loaded.tokenizer, loaded.text_form, [text for own in inputs for text in own]))
    kept: list[tuple[Entry, list[Ids]]] = []
    for entry, own in zip(entries, inputs, strict=True):
        sequences = list(islice(ids, len(own)))
        if loaded.max_positions is None or max(map(len, sequences)) <= loaded.max_positions:
            kept.append((entry, sequences))
    if not kept:
        raise DataError(f"{name}: every row is above the model's {loaded.max_positions} positions.")
    rows = [TokenizedRow.of(sequences, ranks_of(entry)) for entry, sequences in kept]
    return BenchmarkSet(
        benchmark,
        [entry for entry, _ in kept],
        loaded.text_form,
        TokenizedSet.from_rows(rows, name),
        _labels_of(kept, rows),
        num_without,
        len(entries) - len(kept),
    )


def _labels_of(kept: Sequence[tuple[Entry, list[Ids]]], rows: Sequence[TokenizedRow]) -> RowLabels:
    prompts = [text_key(row.ids[: row.prefix_length]) for row in rows]
    groups = [entry.subsets[0] if entry.subsets else "" for entry, _ in kept]
    return RowLabels(np.array(prompts, np.uint64), groups)
