"""What an evaluation found of each set, and its files: `evaluation.json`, and the comparisons as parquet.

Written by training after it evaluates and by `rayrm evaluate --output`; read by reports, comparisons and the
gate. The JSON holds figures and the texts of the worst errors, a parquet file one row for each comparison.
A record is written whole or not at all: its JSON comes last, and names the files that are its own.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import IngestReport, RowLabels, TokenizedSet
from rayrm.errors import DataError, writing
from rayrm.metrics.attributes import rewards_of
from rayrm.metrics.calibration import reliability
from rayrm.metrics.describe import describe, describe_groups, findings
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.intervals import NUM_RESAMPLES
from rayrm.metrics.names import OF_OUTCOMES
from rayrm.metrics.outcomes import Outcomes, decided, outcomes_of
from rayrm.objective import Objective
from rayrm.train.evaluation import Scores
from rayrm.train.records import replace_text

EVALUATION = "evaluation.json"
_FORMAT = 1
_NUM_WORST = 20
_MANY_LEFT_OUT = 0.05
_LONGEST_TEXT = 4000
_LONGEST_LEAD = 200
"""Characters by which two answers may begin alike before they are no longer told from their line on."""
_COLUMNS = [one.name for one in fields(Outcomes) if one.name not in ("group", "groups")]


@dataclass(frozen=True, slots=True)
class SetEvaluation:
    """Of one set: flat figures, those of its groups, the bins of the reliability curve, what to look at.

    `outcomes`: its comparisons that have a winner. `worst`: the pairs of which the model was most sure, and
    wrong, with their texts. `benchmark`: of a benchmark's own shape, its own figures.
    """

    metrics: dict[str, float]
    outcomes: Outcomes
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    reliability: list[dict[str, float]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """What a model was measured to be, set by set. `version`: of a published one; `step`: of a run's."""

    model: str
    sets: dict[str, SetEvaluation]
    version: str | None = None
    step: int | None = None
    created: str = ""


def set_metrics(scores: Scores, index: RowIndex, objective: Objective) -> dict[str, float]:
    """What is logged of a scored set: the figures of `evaluate_scores`, and some of its comparisons."""
    outcomes = outcomes_of(rewards_of(scores), index)
    said = describe(outcomes)
    logged = {name: said[name] for name in OF_OUTCOMES if name in said}
    return logged | evaluate_scores(scores, index, objective)


def evaluate_set(
    scores: Scores,
    rows: TokenizedSet,
    objective: Objective,
    tokenizer: Any,
    labels: RowLabels | None = None,
) -> SetEvaluation:
    """All that is measured of a scored set; `scores` as `evaluate_scores` takes them.

    `labels`: prompts and groups of its rows, where the set does not know them itself.
    """
    metrics = evaluate_scores(scores, rows.index, objective)
    labels = labels or rows.labels()
    outcomes = outcomes_of(rewards_of(scores), rows.index, prompts=labels.prompts, groups=labels.groups)
    found = of_outcomes(metrics, outcomes, _worst(outcomes, rows, tokenizer))
    found.findings[:0] = _left_out(rows.report)
    return found


def _left_out(report: IngestReport) -> list[str]:
    """A sentence where the figures are of visibly less than the rows that were read."""
    refused = sum(report.refused.values())
    if refused <= _MANY_LEFT_OUT * report.num_rows:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.refused.items())
    return [
        f"{refused:,} of {report.num_rows:,} rows ({refused / report.num_rows:.0%}) were left out "
        f"({reasons}): the figures are of the others."
    ]


def of_outcomes(
    metrics: dict[str, float],
    outcomes: Outcomes,
    worst: Sequence[dict[str, Any]] = (),
) -> SetEvaluation:
    """What comparisons say beside the `metrics` of `evaluate_scores`."""
    if not len(outcomes.row):
        return SetEvaluation(metrics, outcomes)
    return SetEvaluation(
        describe(outcomes, num_resamples=NUM_RESAMPLES) | metrics,
        outcomes,
        describe_groups(outcomes),
        [asdict(one) for one in reliability(outcomes)],
        findings(outcomes),
        list(worst),
    )


def write_evaluation(record: EvaluationRecord, directory: Path) -> Path:
    """Write the record into `directory` in the place of an earlier one; returns its JSON file.

    Raises RunDirectoryError where the disk takes no file.
    """
    file = directory / EVALUATION
    sets: dict[str, Any] = {}
    with writing(file):
        directory.mkdir(parents=True, exist_ok=True)
        mark = os.urandom(4).hex()  # the files of an earlier record stay whole until this one names its own
        for place, (name, one) in enumerate(record.sets.items()):
            kept = f"outcomes-{place}-{mark}.parquet"
            pq.write_table(_as_table(one.outcomes), directory / kept)
            told = {part.name: getattr(one, part.name) for part in fields(one) if part.name != "outcomes"}
            sets[name] = {key: value for key, value in told.items() if value is not None} | {"outcomes": kept}
        said = {
            "format": _FORMAT,
            "model": record.model,
            "version": record.version,
            "step": record.step,
            "created": record.created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sets": sets,
        }
        replace_text(file, json.dumps(said, indent=2, allow_nan=False) + "\n")
        for old in directory.glob("outcomes-*.parquet"):
            if old.name not in {one["outcomes"] for one in sets.values()}:
                old.unlink()
    return file


def read_evaluation(directory: Path) -> EvaluationRecord:
    """The record in `directory`. Raises DataError naming what is missing, or is no record of ours."""
    file = directory / EVALUATION
    if not file.is_file():
        raise DataError(
            f"{directory} has no {EVALUATION}: nothing was evaluated into it. Type `rayrm evaluate MODEL "
            f"DATA --output {directory}`."
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["format"] != _FORMAT:
            raise DataError(f"{file} is of format {said['format']}, and {_FORMAT} is read. Evaluate again.")
        sets = {}
        for name, one in said["sets"].items():
            table = pq.read_table(directory / one["outcomes"])
            sets[name] = SetEvaluation(**(one | {"outcomes": _from_table(table)}))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {error}). Evaluate again into another directory."
        ) from error
    return EvaluationRecord(said["model"], sets, said["version"], said["step"], said["created"])


def _as_table(outcomes: Outcomes) -> pa.Table:
    names = pa.DictionaryArray.from_arrays(outcomes.group.astype(np.int32), list(outcomes.groups))
    columns = {name: pa.array(getattr(outcomes, name)) for name in _COLUMNS}
    return pa.table(columns | {"group": names})


def _from_table(table: pa.Table) -> Outcomes:
    arrays = {name: table.column(name).to_numpy() for name in _COLUMNS}
    names, group = np.unique(table.column("group").to_pylist(), return_inverse=True)
    return Outcomes(**arrays, group=group.astype(np.int64), groups=tuple(names.tolist()))


def _worst(outcomes: Outcomes, rows: TokenizedSet, tokenizer: Any) -> list[dict[str, Any]]:
    """The comparisons whose margin lies farthest below zero, one of a row, with what the model read."""
    order = np.argsort(outcomes.margin, kind="stable")
    order = order[outcomes.margin[order] <= 0]
    _, first = np.unique(outcomes.row[order], return_index=True)
    chosen = order[np.sort(first)][:_NUM_WORST]
    _, won, lost, _ = decided(rows.index)
    begins = rows.index.first[outcomes.row]
    return [
        {
            "where": rows.name_of(row),
            "group": outcomes.groups[outcomes.group[place]],
            "margin": float(outcomes.margin[place]),
            "chosen_score": float(outcomes.won[place]),
            "rejected_score": float(outcomes.lost[place]),
            **_texts(row, won[place] - begins[place], lost[place] - begins[place], tokenizer),
        }
        for place, row in zip(chosen.tolist(), rows.fetch(outcomes.row[chosen]), strict=True)
    ]


def _texts(row: TokenizedRow, won: int, lost: int, tokenizer: Any) -> dict[str, str]:
    """What both texts begin with, up to the last whole line or word, and how each goes on."""
    sequences = row.sequences
    chosen, rejected = (tokenizer.decode(sequences[place].tolist()) for place in (won, lost))
    alike = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - of characters, no paths
    line, word = alike.rfind("\n") + 1, alike.rfind(" ") + 1
    cut = line if line and len(alike) - line <= _LONGEST_LEAD else word
    texts = {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return {name: _shortened(text) for name, text in texts.items()}


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
