"""The part of a report that tells of an evaluation: the table of its sets, and of each set its pictures.

All figures are those that `evaluation.json` has; what is drawn comes from the outcomes beside it. Where a set
has nothing to draw, a sentence says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayrm.metrics.calibration import Bin
from rayrm.metrics.outcomes import Outcomes
from rayrm.report.document import Block, Cell, Drawing, Number, Passage, Section, Sentence, Table
from rayrm.report.evaluation_figures import (
    GroupAccuracy,
    group_bars,
    margins,
    reliability_curve,
    rewards,
    score_by_length,
)
from rayrm.report.run_files import EvaluatedSet, Evaluation

_NUM_WORST = 20
_FEW_SETS = 4
_BY_PROMPT = "accuracy_bootstrap"
MEASURES = (
    ("accuracy", "accuracy"),
    ("the longer one wins", "length_baseline_accuracy"),
    ("chance", "random_baseline_accuracy"),
    ("accuracy, length held equal", "length_controlled_accuracy"),
    ("accuracy, chosen longer", "accuracy_chosen_longer"),
    ("accuracy, chosen shorter", "accuracy_chosen_shorter"),
    ("correlation of score and length", "length_correlation"),
    ("ties", "ties"),
    ("margin", "margin"),
    ("loss", "loss"),
    ("calibration error (ECE)", "ece"),
    ("calibration error by chance", "ece_noise"),
    ("fitted temperature", "temperature"),
    ("calibration error at it", "ece_at_temperature"),
)
"""What a reader wants of a set, and the name that `evaluation.json` has for it."""
_OPEN_SETS = 3
_FORMS = {
    "percent": ("accuracy", "ties", "ece", "confidence", "consistency"),
    "count": ("num_",),
    "signed": ("margin", "length_correlation", "mean_reward", "min_reward", "max_reward", "pearson"),
}
_NO_OUTCOMES = "The scores of this set are not at hand, so that they are not drawn."


def form_of(metric: str) -> str:
    """How people read a metric of this name."""
    for form, words in _FORMS.items():
        if any(word in metric for word in words):
            return form
    return "number"


def measured(metrics: dict[str, float], key: str) -> Number:
    """A metric with its interval, where `<key>_low` and `<key>_high` are among the metrics."""
    return Number(metrics.get(key), form_of(key), metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))


def evaluation_sections(evaluation: Evaluation | None, absent: str) -> list[Section]:
    """The sections of an evaluation; with none at all one section, which says `absent`."""
    if evaluation is None:
        return [Section("evaluation", "Evaluation", [Sentence(absent)])]
    if not evaluation.sets:
        return [Section("evaluation", "Evaluation", [Sentence("The evaluation has no set.")])]
    several = len(evaluation.sets) > 1
    sections = [Section("evaluation", "Evaluation", [sets_table(evaluation)])]
    for place, one in enumerate(evaluation.sets):
        title = f"Set: {one.name}" if several else f"Scores on {one.name}"
        mark = one.name if several else ""
        sections.append(Section(f"set:{one.name}", title, _set_blocks(one, mark), place >= _OPEN_SETS))
    return sections


def sets_table(evaluation: Evaluation) -> Table:
    """What was measured on each set: accuracy beside what needs no model, loss, calibration, bias by length.

    Few sets are columns, which a phone can show; many are rows.
    """
    every = [one.metrics for one in evaluation.sets]
    measures: list[tuple[str, list[Cell]]] = [
        ("pairs", [Number(of.get("num_pairs"), "count") for of in every]),
    ]
    for name, key in MEASURES:
        measures.append((name, [measured(of, key) for of in every]))
    by_prompt: list[Cell] = [
        Number(of.get("accuracy"), "percent", of.get(f"{_BY_PROMPT}_low"), of.get(f"{_BY_PROMPT}_high"))
        for of in every
        if f"{_BY_PROMPT}_low" in of
    ]
    if len(by_prompt) == len(every):
        measures.insert(2, ("accuracy, interval by prompt", by_prompt))
    measures = [(name, cells) for name, cells in measures if any(str(cell) != "–" for cell in cells)]
    names = [one.name for one in evaluation.sets]
    if len(names) <= _FEW_SETS:
        return Table("sets", ["measure", *names], [[name, *cells] for name, cells in measures])
    rows = [[name, *(cells[place] for _, cells in measures)] for place, name in enumerate(names)]
    return Table("sets", ["set", *(name for name, _ in measures)], rows)


def _set_blocks(one: EvaluatedSet, mark: str) -> list[Block]:
    blocks: list[Block] = []
    if one.benchmark:
        own = [(key, Number(value, form_of(key))) for key, value in one.benchmark.items()]
        blocks.append(Table("benchmark", ("of the benchmark", "value"), own))
    nothing = _constant(one.outcomes)
    if nothing is not None:
        blocks.append(Sentence(nothing))
    blocks += _score_drawings(one, mark)
    if nothing is None or one.outcomes is None:
        blocks += _group_blocks(one, mark)
    every = [(key, Number(value, form_of(key))) for key, value in one.metrics.items()]
    blocks.append(Table("metrics", ("metric", "value"), every, folded=f"All {len(every)} metrics"))
    blocks += _worst(one.worst)
    return blocks


def _constant(outcomes: Outcomes | None) -> str | None:
    """A sentence on scores of which nothing can be drawn; None: there is something."""
    if outcomes is None:
        return _NO_OUTCOMES
    scores = np.concatenate([outcomes.won, outcomes.lost])
    if not len(scores):
        return "No comparison of this set has a winner, so that there are no scores to draw."
    if np.ptp(scores) == 0:
        return f"Every score is {scores[0]:.4g}: the model tells nothing apart, and there is nothing to draw."
    return None


def _score_drawings(one: EvaluatedSet, mark: str) -> list[Block]:
    outcomes = one.outcomes
    if outcomes is None or _constant(outcomes) is not None:
        return []
    bins = [
        Bin(b["low"], b["high"], b["confidence"], b["accuracy"], int(b["count"]), b.get("weight", b["count"]))
        for b in one.reliability
        if {"low", "high", "confidence", "accuracy", "count"} <= set(b)
    ]
    length = np.concatenate([outcomes.won_length, outcomes.lost_length]).astype(np.float64)
    score = np.concatenate([outcomes.won, outcomes.lost])
    return [
        Drawing(
            "scores",
            rewards(mark, outcomes.won, outcomes.lost),
            numbers={"chosen": spread(outcomes.won), "rejected": spread(outcomes.lost)},
        ),
        Drawing(
            "margins",
            margins(mark, outcomes.margin),
            "Every margin is the same: there is no distribution to draw.",
            spread(outcomes.margin),
        ),
        Drawing(
            "reliability",
            reliability_curve(mark, bins, calibration_line(one.metrics)),
            "The evaluation has no reliability curve of this set.",
            one.reliability,
        ),
        Drawing(
            "score_by_length",
            score_by_length(mark, length, score),
            "All completions have the same length, so that scores cannot follow it.",
            {"length": spread(length), "correlation": one.metrics.get("length_correlation")},
        ),
    ]


def calibration_line(metrics: dict[str, float]) -> str:
    """The expected calibration error as a sentence, with what a temperature would make of it."""
    if "ece" not in metrics:
        return ""
    text = f"Expected calibration error {100 * metrics['ece']:.1f}%"
    if "temperature" not in metrics:
        return f"{text}."
    text += f"; margins divided by a temperature of {metrics['temperature']:.3g} fit best"
    if "ece_at_temperature" in metrics:
        text += f", and leave {100 * metrics['ece_at_temperature']:.1f}%"
    return f"{text}."


def spread(values: Any) -> dict[str, float]:
    """Count, mean, deviation and quantiles of finite values: what their histogram shows."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"count": 0}
    points = dict(
        zip(("min", "p5", "p25", "p50", "p75", "p95", "max"), (0, 5, 25, 50, 75, 95, 100), strict=True)
    )
    quantiles = {name: float(np.percentile(values, point)) for name, point in points.items()}
    return {"count": len(values), "mean": float(values.mean()), "std": float(values.std()), **quantiles}


def _group_blocks(one: EvaluatedSet, mark: str) -> list[Block]:
    names = [name for name in one.groups if "accuracy" in one.groups[name]]
    if len(names) < 2:
        which = f"of one group ({names[0]})" if names and names[0] else "of one group"
        return [Sentence(f"All comparisons are {which}: there are no others to set it beside.")]
    names.sort(key=lambda name: -one.groups[name]["accuracy"])
    bars = [
        GroupAccuracy(
            name,
            group["accuracy"],
            group.get("accuracy_low", np.nan),
            group.get("accuracy_high", np.nan),
            group.get("length_baseline_accuracy", np.nan),
            int(group.get("num_pairs", 0)),
        )
        for name, group in ((name, one.groups[name]) for name in names)
    ]
    rows: list[Sequence[Cell]] = [
        [
            name,
            Number(one.groups[name].get("num_pairs"), "count"),
            measured(one.groups[name], "accuracy"),
            measured(one.groups[name], "length_baseline_accuracy"),
            measured(one.groups[name], "margin"),
        ]
        for name in names
    ]
    columns = ("group", "pairs", "accuracy", "longer wins", "margin")
    return [
        Sentence(f"By group ({len(names)}), the best on top:"),
        Drawing("group_bars", group_bars(mark, bars), numbers=bars),
        Table("groups", columns, rows, folded=f"The {len(rows)} groups in numbers"),
    ]


def _worst(errors: Sequence[dict[str, Any]]) -> list[Block]:
    if not errors:
        return [Sentence("The evaluation kept no errors to read.")]
    num = min(len(errors), _NUM_WORST)
    blocks: list[Block] = [
        Sentence(f"The {num} most confident errors: where the model prefers the rejected side most.")
        if num > 1
        else Sentence("The most confident error:")
    ]
    for error in errors[:_NUM_WORST]:
        margin, chosen, rejected = (
            Number(error.get(key), "signed") for key in ("margin", "chosen_score", "rejected_score")
        )
        group = f", {error['group']}" if error.get("group") else ""
        texts = [(key, _text(error.get(key))) for key in ("prompt", "chosen", "rejected")]
        texts = [
            (f"{key}, score {score}" if score else key, text)
            for (key, text), score in zip(texts, ("", chosen, rejected), strict=True)
        ]
        numbers = {key: value for key, value in error.items() if key not in ("prompt", "chosen", "rejected")}
        blocks.append(Passage(f"margin {margin}: {error.get('where', '?')}{group}", texts, numbers))
    return blocks


def _text(value: Any) -> str:
    from rayrm.report.rl import plain_text

    return "" if value is None else plain_text(value)
