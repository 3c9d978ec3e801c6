"""[RAY] A saved model and sources of preference rows -> what it is measured to be, set by set.

Read and tokenized by Ray Data, scored here or by several processes (`scoring.py`), measured by the code that
training evaluates with (`train/evaluation_record.py`). With a directory to keep it in, an evaluation that was
cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.config import RewardConfig
from rayrm.data.ingest import ingest
from rayrm.data.labels import LabelRules
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.row_index import RowIndex
from rayrm.data.sources import check_found
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError, RowError
from rayrm.evaluation.benchmark_sets import benchmark_set
from rayrm.evaluation.consistency import measure_consistency
from rayrm.evaluation.scoring import Progress, Scoring
from rayrm.logs import show_logs
from rayrm.metrics.attributes import rewards_of
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.names import logged_of
from rayrm.metrics.outcomes import joined
from rayrm.model.attribute_head import attribute_head_of
from rayrm.model.reward_model import LoadedModel, load_saved
from rayrm.objective import OBJECTIVE_SETTINGS, Objective, PointwiseLoss
from rayrm.serve.registry import MANIFEST
from rayrm.serve.saved import read_json
from rayrm.serve.score_file import read_rows
from rayrm.serve.scorer import RewardModel
from rayrm.train.attributes import reopen_attributes
from rayrm.train.evaluation import Scores
from rayrm.train.evaluation_record import EvaluationRecord, SetEvaluation, evaluate_set, of_outcomes
from rayrm.train.train_data import local_bytes
from rayrm.urls import masked

_FEW_BYTES = 2**25
"""Files that one process tokenizes in some seconds, which is what Ray takes to start."""


def evaluate(
    model: str | Path,
    sources: Sequence[Any] | Mapping[str, Any],
    *,
    max_pairs: int | None = None,
    max_bad_row_fraction: float = 0.01,
    objective: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    keep: Path | None = None,
    consistency_rows: int = 0,
    on_progress: Progress | None = None,
) -> EvaluationRecord:
    """What a saved model is measured to be on each source, by its name, and on "all" where there are several.

    Measured is by the objective of the run that trained it: it is kept with the model (`rayrm.json`), and is
    TRL's where nothing is. A model trained without a loss of scores is measured against them as
    `pointwise_loss` "mse" trains. Ratings by attribute are measured where the model has their heads
    (`attributes/heads.safetensors`).

    Args:
        sources: what `data.eval` takes, several of them; or by the names that the sets are to have.
        max_pairs: read only the first rows of each source, this many. A pair beyond the model's position
            limit is left out and counted, as in training.
        objective: settings of `RewardConfig` (`OBJECTIVE_SETTINGS`) to take instead of the model's own.
        num_workers: processes that score, each with the model in its memory and a GPU, or a CPU where the
            cluster has none; 0: this one, with all it has.
        keep: where scores are kept until all are there; None: an evaluation that is cut off starts anew.
        consistency_rows: how many of the first rows of each source are scored again with harmless changes,
            some six times each; see `consistency.py`.
        on_progress: called with (source, rows done, rows in all).

    Raises:
        ModelError: no saved reward model. DataError: a source that is missing, bad, or of the other text
            form than the model. ConfigError: settings that are no objective.
    """
    show_logs()
    if not sources:
        raise DataError("there is nothing to evaluate on. Give at least one path, glob or hub name.")
    named = sources if isinstance(sources, Mapping) else {masked(str(one)): one for one in sources}
    for source in named.values():
        check_found(source)
    _check_counts(num_workers=num_workers, consistency_rows=consistency_rows)
    loaded = load_saved(model)
    reopen_attributes(loaded.model, Path(model))
    scoring = Scoring(loaded, Path(model), num_workers=num_workers, keep=keep)
    sets = evaluate_loaded(
        scoring,
        named,
        objective_of(loaded, objective or {}),
        max_pairs=max_pairs,
        max_bad_row_fraction=max_bad_row_fraction,
        consistency_rows=consistency_rows,
        on_progress=on_progress,
    )
    return EvaluationRecord(str(model), sets, _version_of(Path(model)))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ConfigError(f"`{name}` ({count}) must be at least 0.")


def evaluate_loaded(
    scoring: Scoring,
    named: Mapping[str, Any],
    chosen: Objective,
    *,
    max_pairs: int | None = None,
    max_bad_row_fraction: float = 0.01,
    consistency_rows: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, SetEvaluation]:
    """Every set by its name, and "all" of several; of a model that is loaded. See `evaluate`."""
    loaded = scoring.loaded
    sets: dict[str, SetEvaluation] = {}
    parts: list[tuple[RowIndex, Scores]] = []
    for name, source in named.items():
        benchmark = benchmark_set(source, loaded, name, max_pairs)
        rows = (
            benchmark.rows
            if benchmark
            else _ingest_for(scoring, source, name, max_pairs, max_bad_row_fraction, chosen)
        )
        scores = scoring.scores(rows, name, on_progress)
        found = evaluate_set(scores, rows, chosen, loaded.tokenizer, benchmark.labels if benchmark else None)
        if benchmark:
            own = benchmark.measured(rewards_of(scores)).as_record()
            found = dataclasses.replace(found, benchmark=own)
        if consistency_rows:
            first = benchmark.preferences(consistency_rows) if benchmark else _first(source, consistency_rows)
            found.metrics.update(_consistency(loaded, first))
        sets[name] = found
        parts.append((rows.index, scores))
    if len(parts) > 1:
        index = RowIndex.joined([index for index, _ in parts])
        metrics = evaluate_scores(np.concatenate([scores for _, scores in parts]), index, chosen)
        sets["all"] = of_outcomes(metrics, joined({name: one.outcomes for name, one in sets.items()}))
    scoring.forget()
    return sets


def evaluate_model(model: str | Path, sources: Sequence[Any], **settings: Any) -> dict[str, dict[str, float]]:
    """What training logs of an evaluation, by the source's name; `settings` are those of `evaluate`."""
    return {name: logged_of(one.metrics) for name, one in evaluate(model, sources, **settings).sets.items()}


def objective_of(loaded: LoadedModel, asked: Mapping[str, Any]) -> Objective:
    """What a loaded model is measured by: its own objective, with the settings `asked` over it.

    Raises ConfigError for settings that are none of an objective, or no objective together.
    """
    # Attributes are those that the model has heads of: a published one has none.
    heads = ("attributes", "attribute_weight")
    names = [name for name in OBJECTIVE_SETTINGS if name not in heads]
    settings = {name: value for name, value in loaded.objective.items() if name not in heads} | dict(asked)
    if "tie_model" in asked and "tie_parameter" not in asked:
        settings.pop("tie_parameter", None)  # of the model's own way with ties
    if unknown := sorted(set(settings) - set(names)):
        raise ConfigError(f"`{unknown[0]}` is no setting to evaluate by. Type one of {', '.join(names)}.")
    chosen = Objective.of(RewardConfig(bf16=False, **settings))
    # Scores of completions are measured, whatever the model was trained on.
    pointwise: PointwiseLoss = "mse" if chosen.pointwise_loss == "none" else chosen.pointwise_loss
    head = attribute_head_of(loaded.model)
    if head is None:
        return dataclasses.replace(chosen, pointwise_loss=pointwise)
    weight = float(loaded.objective.get("attribute_weight", Objective().attribute_weight))
    return dataclasses.replace(
        chosen, pointwise_loss=pointwise, attributes=head.names, attribute_weight=weight
    )


def _ingest_for(
    scoring: Scoring,
    source: Any,
    name: str,
    max_pairs: int | None,
    max_bad_row_fraction: float,
    objective: Objective,
) -> TokenizedSet:
    loaded = scoring.loaded
    rows = ingest(
        source,
        loaded.tokenizer,
        max_length=loaded.max_positions,
        max_rows=max_pairs,
        max_bad_row_fraction=max_bad_row_fraction,
        name=name,
        labels=LabelRules.of(objective),
        here=scoring.num_workers == 0 and 0 < local_bytes(source) <= _FEW_BYTES,
    )
    form = rows.report.text_form
    if form not in (loaded.text_form, "tokenized"):
        raise DataError(
            f"{name} is {form} and the model was trained on {loaded.text_form} text: its scores would mean "
            "nothing. Evaluate on rows of "
            + ("message lists." if loaded.text_form == "conversational" else "plain strings.")
        )
    return rows


def _first(source: Any, num_rows: int) -> list[PreferenceRow]:
    """The first rows of a file, glob or hub name that are of the usual forms."""
    rows: list[PreferenceRow] = []
    for _, content in islice(read_rows(source), num_rows) if isinstance(source, str) else ():
        with suppress(RowError):
            rows.append(parse_row(content))
    return rows


def _consistency(loaded: LoadedModel, rows: Sequence[PreferenceRow]) -> dict[str, float]:
    """How preferences outlast harmless changes, of no rows nothing."""
    model = RewardModel(loaded)
    try:
        changes = measure_consistency(rows, partial(model.score_inputs, truncation="left")) if rows else []
    finally:
        model.release()  # now, and not when it is collected: the next set's scorer wraps the same model
    return {name: value for change in changes for name, value in change.metrics.items()}


def _version_of(model: Path) -> str | None:
    """The version of a published model; None for any other directory."""
    file = model / MANIFEST
    return str(read_json(file)["version"]) if file.is_file() else None
