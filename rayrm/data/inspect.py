"""What a look at preference data tells before a run: the rows of sources, tokenized, and figures of them.

`gather` reads and tokenizes in this process, without Ray: what it keeps is the rows' index, about 150 bytes a
pair, so that a million pairs need no more than the tokenizer's time (its threads use all cores).
`figures_of` is pure: figures of all rows or of some, of which those about what is trained on (lengths apart)
count the rows that fit `max_length`. A row weighs 1 and each of its n comparisons 1/n, as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.data.attributes import names_in
from rayrm.data.blocks import ROWS_PER_TABLE, index_of, tokenized_tables
from rayrm.data.inspect_ratings import by_attribute, in_columns, parsed, readable, spread
from rayrm.data.labels import ANY_LABELS, UNRANKED
from rayrm.data.preference import PreferenceRow, form_of
from rayrm.data.quarantine import SourceCounts
from rayrm.data.repeats import best_positions, conflicts, duplicates, tokens_prompts_once
from rayrm.data.row_index import Places, RowIndex
from rayrm.data.selection import prompt_hash, prompt_of
from rayrm.data.sources import SourceRow, plan_sources, read_work, row_name
from rayrm.errors import ConfigError, DataError

Keys = npt.NDArray[np.uint64]
ALL = "all sources"
NUM_BINS = 16


@dataclass(frozen=True, slots=True)
class Gathered:
    """R accepted rows of all sources, and what became of the others.

    `source` (which of `names`), `file`, `row`, `prompt` (its hash), `is_ranking`, `has_prompt` `[R]`;
    `files` names what `file` counts. `counts` and `forms` go by source name. `attributes`: by which
    completions are rated, in the order of the index's columns; `unread`, by source name: how many rows have
    ratings that no run could read, and the first of them.
    """

    names: list[str]
    files: list[str]
    index: RowIndex
    source: Places
    file: Places
    row: Places
    prompt: Keys
    is_ranking: npt.NDArray[np.bool_]
    has_prompt: npt.NDArray[np.bool_]
    counts: dict[str, SourceCounts]
    forms: dict[str, Counter[str]]
    attributes: tuple[str, ...] = ()
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """What messages call a row: its file and line."""
        return row_name(self.files[self.file[row]], int(self.row[row]))

    def of_source(self, name: str) -> Gathered:
        """One source's rows alone."""
        rows = np.flatnonzero(self.source == self.names.index(name))
        return replace(
            self.take(rows),
            names=[name],
            counts={name: self.counts[name]},
            forms={name: self.forms[name]},
            unread={name: self.unread[name]},
        )

    def take(self, rows: Places) -> Gathered:
        """Some of the rows."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, index=self.index.take(rows), **columns)


_COLUMNS = ("source", "file", "row", "prompt", "is_ranking", "has_prompt")


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a source, or of all. Counts of rows where no other unit is said.

    `num_dropped`: those with a text above `max_length`, as long as text and prompt are together. From
    `num_kept` on, figures are of the other rows.
    """

    name: str
    num_rows: int
    num_accepted: int
    refused: dict[str, int]
    examples: dict[str, str]
    forms: dict[str, int]
    max_length: int | None
    num_dropped: int
    max_length_for_99_percent: int
    max_length_for_all: int
    lengths: dict[str, float]  # tokens of each whole text: min, median, mean, p90, p99, max
    histogram: list[tuple[int, int | None, int]]  # from, to (None: no end), texts
    num_kept: int = 0
    num_completions: int = 0
    num_comparisons: int = 0
    completions_per_row: dict[int, int] = field(default_factory=dict)
    num_rankings: int = 0
    num_tied: int = 0  # rows with completions of equal rank
    best_position: dict[int, float] = field(default_factory=dict)  # of rankings, from 0; shares
    num_without_prompt: int = 0  # rows whose prompt is in their completions, if anywhere
    num_margins: int = 0
    margins: dict[str, float] = field(default_factory=dict)  # of those: min, mean, max
    num_soft: int = 0  # rows with a `target` other than 1
    targets: dict[str, float] = field(default_factory=dict)  # of those
    num_all_tied: int = 0  # rows with nothing better or worse
    num_scored: int = 0  # rows whose completions have scores
    scores: dict[str, float] = field(default_factory=dict)  # of completions
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)  # ratings by each: count, min, ...
    num_only_rated: int = 0  # rows with ratings in the place of an order and of scores
    num_unread: int = 0  # of all: rows with ratings that no run could read
    unread: str = ""  # the first of them
    tokens_unshared: int = 0
    tokens_shared_in_rows: int = 0
    tokens_prompts_once: int = 0
    num_prompts: int = 0
    most_rows_of_a_prompt: int = 0
    prompts_in_common: dict[str, int] = field(default_factory=dict)  # with other sources
    num_duplicates: int = 0  # rows that repeat an earlier one
    duplicate: tuple[str, str] | None = None
    num_conflicts: int = 0  # pairs of texts preferred both ways
    num_conflicting: int = 0  # rows they stand in
    conflict: tuple[str, str] | None = None
    better_is_longer: float = 0.0
    better_is_shorter: float = 0.0
    longer_wins: float = 0.0  # the accuracy of that rule; equal lengths count half


class GivenIds:
    """In the place of a tokenizer, where all rows are tokenized already: any id may be in its vocabulary."""

    def __len__(self) -> int:
        return 2**31


def gather(
    paths: Sequence[str],
    tokenizer: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> Gathered:
    """All rows of the sources, tokenized at any length, each source's first `max_rows` only.

    `on_progress` is called with (source, rows read of it). Raises `DataError` for a source that is missing,
    unreadable or empty, `ConfigError` for text where `tokenizer` is `GivenIds`.
    """
    names, files = list(dict.fromkeys(paths)), list[str]()
    counts = {name: SourceCounts() for name in names}
    forms: dict[str, Counter[str]] = {name: Counter() for name in names}
    attributes, unread = list[str](), dict.fromkeys(names, (0, ""))
    parts: list[tuple[RowIndex, dict[str, npt.NDArray[Any]]]] = []
    for source, name in enumerate(names):
        plan = plan_sources(name, max_rows=max_rows, name=name, columns=columns)
        rows = (row for piece in plan.work for row in read_work(piece))
        for batch in _batches(rows):
            rated_by = names_in(row.content for row in batch)
            labels = replace(ANY_LABELS, attributes=rated_by)
            for place, row in enumerate(batch):
                batch[place], why = readable(row, labels)
                if why is not None:
                    unread[name] = (unread[name][0] + 1, unread[name][1] or why)
            entries = [parsed(row, labels) for row in batch]
            if isinstance(tokenizer, GivenIds):
                _check_given_ids(batch, entries)
            (table,) = tokenized_tables(batch, tokenizer, None, labels=labels)
            block = index_of(table)
            attributes += [attribute for attribute in rated_by if attribute not in attributes]
            index = replace(block.rows, attributes=in_columns(block.rows.attributes, rated_by, attributes))
            of_place = {
                (row.source, row.number): entry for row, entry in zip(batch, entries, strict=True) if entry
            }
            accepted = [
                of_place[place] for place in zip(block.source.tolist(), block.row.tolist(), strict=True)
            ]
            counts[name].num_rows += block.num_rows
            for refusal in block.refusals:
                counts[name].add(refusal)
            forms[name].update(form_of(row) for row in accepted)
            own: dict[str, npt.NDArray[Any]] = {
                "source": np.full(len(accepted), source, np.int32),
                "file": (block.source + len(files)).astype(np.int32),
                "row": block.row,
                "prompt": np.array([prompt_hash(prompt_of(row)) for row in accepted], np.uint64),
                "has_prompt": np.array([bool(row.prompt) or row.ids is not None for row in accepted], bool),
                "is_ranking": np.array([_is_ranking(row) for row in accepted], bool),
            }
            parts.append((index, own))
            if on_progress is not None:
                on_progress(name, counts[name].num_rows)
        if not counts[name].num_rows:
            raise DataError(f"{name} has no rows; give a source that has some")
        files.extend(plan.names)
    joined = {name: np.concatenate([own[name] for _, own in parts]) for name in _COLUMNS}
    indices = [
        replace(rows, attributes=in_columns(rows.attributes, attributes, attributes)) for rows, _ in parts
    ]
    return Gathered(
        names,
        files,
        RowIndex.joined(indices),
        **joined,
        counts=counts,
        forms=forms,
        attributes=tuple(attributes),
        unread=unread,
    )


def figures_by_source(gathered: Gathered, max_length: int | None) -> list[Figures]:
    """Figures of each source, and of all together where there are several."""
    parts = [gathered.of_source(name) for name in gathered.names]
    prompts = {part.names[0]: np.unique(part.prompt) for part in parts}
    found = []
    for part in parts:
        own = prompts[part.names[0]]
        common = {
            name: len(np.intersect1d(own, other, assume_unique=True))
            for name, other in prompts.items()
            if name != part.names[0]
        }
        figures = figures_of(part, part.names[0], max_length)
        found.append(replace(figures, prompts_in_common={name: n for name, n in common.items() if n}))
    return found if len(parts) == 1 else [*found, figures_of(gathered, ALL, max_length)]


def figures_of(gathered: Gathered, name: str, max_length: int | None) -> Figures:
    """Figures of all the rows gathered."""
    index = gathered.index
    refused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for counts in gathered.counts.values():
        refused += counts.refused
        for reason, refusal in counts.first.items():
            examples.setdefault(reason, refusal.message)
    whole = Figures(
        name,
        num_rows=sum(counts.num_rows for counts in gathered.counts.values()),
        num_accepted=index.num_rows,
        refused=dict(refused.most_common()),
        examples=examples,
        forms=dict(sum(gathered.forms.values(), Counter()).most_common()),
        max_length=max_length,
        num_dropped=0,
        max_length_for_99_percent=0,
        max_length_for_all=0,
        lengths={},
        histogram=[],
        num_unread=sum(count for count, _ in gathered.unread.values()),
        unread=next((first for count, first in gathered.unread.values() if count), ""),
    )
    if not index.num_rows:
        return whole
    longest = np.maximum.reduceat(index.lengths, index.first[:-1])
    kept = np.flatnonzero(longest <= (longest.max() if max_length is None else max_length))
    whole = replace(
        whole,
        num_dropped=index.num_rows - len(kept),
        max_length_for_99_percent=_quantile(longest, 0.99),
        max_length_for_all=int(longest.max()),
        lengths=_length_figures(index.lengths),
        histogram=_histogram(index.lengths),
    )
    return _with_rows(whole, gathered.take(kept)) if len(kept) else whole


def _with_rows(figures: Figures, kept: Gathered) -> Figures:
    """The figures of the rows that are trained on."""
    index, compared = kept.index, kept.index.comparisons()
    sizes, size_counts = np.unique(index.num_completions, return_counts=True)
    given = index.margins[index.margins != 0]
    rows_of_prompt = np.unique(kept.prompt, return_counts=True)[1]
    highest = np.maximum.reduceat(index.ranks, index.first[:-1])
    is_ranked = highest != UNRANKED
    is_scored = ~np.isnan(np.fmax.reduceat(index.ratings, index.first[:-1]))
    is_compared = np.bincount(compared.row, minlength=index.num_rows) > 0
    ahead = np.sign(index.lengths[compared.better] - index.lengths[compared.worse]) * compared.direction
    decided = compared.weight * np.abs(compared.direction)
    shares = [float(decided @ (ahead == sign)) / max(float(decided.sum()), 1e-9) for sign in (1, -1)]
    num_duplicates, duplicate = duplicates(index)
    num_conflicts, conflicting, conflict = conflicts(index, compared)
    return replace(
        figures,
        num_kept=index.num_rows,
        num_completions=len(index.lengths),
        num_comparisons=len(compared.row),
        completions_per_row=dict(zip(sizes.tolist(), size_counts.tolist(), strict=True)),
        num_rankings=int(kept.is_ranking.sum()),
        num_tied=int((is_ranked & (highest + 1 < index.num_completions)).sum()),
        best_position=best_positions(index, kept.is_ranking),
        num_without_prompt=int((~kept.has_prompt).sum()),
        num_margins=len(given),
        margins=spread(given),
        num_soft=int((index.targets != 1).sum()),
        targets=spread(index.targets[index.targets != 1]),
        num_all_tied=int((~is_compared & is_ranked).sum()),
        num_scored=int(is_scored.sum()),
        scores=spread(index.ratings[~np.isnan(index.ratings)]),
        attributes=by_attribute(index, kept.attributes),
        num_only_rated=int((~is_ranked & ~is_scored).sum()),
        tokens_unshared=int(index.tokens(share=False).sum()),
        tokens_shared_in_rows=int(index.tokens(share=True).sum()),
        tokens_prompts_once=tokens_prompts_once(index, kept.prompt),
        num_prompts=len(rows_of_prompt),
        most_rows_of_a_prompt=int(rows_of_prompt.max()),
        num_duplicates=num_duplicates,
        duplicate=duplicate and (kept.place(duplicate[0]), kept.place(duplicate[1])),
        num_conflicts=num_conflicts,
        num_conflicting=conflicting,
        conflict=conflict and (kept.place(conflict[0]), kept.place(conflict[1])),
        better_is_longer=shares[0],
        better_is_shorter=shares[1],
        longer_wins=shares[0] + (1 - shares[0] - shares[1]) / 2,
    )


def _is_ranking(row: PreferenceRow) -> bool:
    return row.names[0].startswith("completions") and UNRANKED not in row.ranks


def _batches(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while batch := list(islice(rows, ROWS_PER_TABLE)):
        yield batch


def _check_given_ids(batch: Sequence[SourceRow], parsed: Sequence[PreferenceRow | None]) -> None:
    for row, entry in zip(batch, parsed, strict=True):
        if entry is not None and entry.ids is None:
            raise ConfigError(
                f"`--model` (none): {row.where} is text: how many tokens it has depends on the tokenizer. "
                "Type the model you will train, a directory or hub name: --model HuggingFaceTB/SmolLM2-135M"
            )


def _quantile(values: npt.NDArray[np.integer], share: float) -> int:
    """The least of the values that as many as `share` of them do not exceed."""
    return int(np.quantile(values, share, method="inverted_cdf"))


def _length_figures(lengths: npt.NDArray[np.integer]) -> dict[str, float]:
    return {
        "min": int(lengths.min()),
        "median": _quantile(lengths, 0.5),
        "mean": float(lengths.mean()),
        "p90": _quantile(lengths, 0.9),
        "p99": _quantile(lengths, 0.99),
        "max": int(lengths.max()),
    }


def _histogram(lengths: npt.NDArray[np.integer]) -> list[tuple[int, int | None, int]]:
    """Bins of one round width up to where 99% stand, and one without end for the rest."""
    top = _quantile(lengths, 0.99)
    width = next(step for step in _round_numbers() if step * NUM_BINS > top)
    num_bins = top // width + 1
    counts = np.bincount(np.minimum(lengths // width, num_bins), minlength=num_bins + 1).tolist()
    bins: list[tuple[int, int | None, int]] = [
        (place * width, (place + 1) * width - 1, counts[place]) for place in range(num_bins)
    ]
    return bins if not counts[num_bins] else [*bins, (num_bins * width, None, counts[num_bins])]


def _round_numbers() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
