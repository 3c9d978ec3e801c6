"""Several runs or evaluations beside each other: settings that differ, curves over each other, paired tests.

The first is what the others are held against. A paired test is made where both evaluations have the same
comparisons (rows, prompts, lengths); where they have not, a sentence says what differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.errors import RunDirectoryError
from rayrm.metrics.comparison import PairedTest, compare
from rayrm.metrics.outcomes import Outcomes
from rayrm.report.document import Block, Cell, Drawing, Number, Report, Section, Sentence, Table, write_report
from rayrm.report.evaluation_figures import agreement, binned
from rayrm.report.evaluation_sections import MEASURES, measured
from rayrm.report.figures import COLOURS, Curve, curves
from rayrm.report.run import final_accuracies, warnings_of
from rayrm.report.run_files import EvaluatedSet, RunFiles, read_run_files
from rayrm.report.run_sections import CURVES, cost_of, default_settings, flat_settings, set_name

COMPARISON = "comparison.html"
_OWN = ("output_dir", "run_name")


def write_comparison(directories: Sequence[str | Path], page: str | Path = COMPARISON) -> Path:
    """Write the comparison of two or more runs or evaluations to `page`, `.md` and `.json` beside it.

    Raises:
        RunDirectoryError: fewer than two, one that holds neither a run nor an evaluation, or a disk that
            takes no file.
    """
    if len(directories) < 2:
        raise RunDirectoryError(
            f"A comparison takes two directories or more, and got {len(directories)}. Type: rayrm report A B "
            "--compare"
        )
    return write_report(comparison_of([read_run_files(one) for one in directories]), Path(page))


def comparison_of(runs: Sequence[RunFiles]) -> Report:
    """What there is to say of runs beside each other; the first is the one that others are held against."""
    names = names_of(runs)
    several = [(name, run) for name, run in zip(names, runs, strict=True)]
    notes = [f"{name}: {note}" for name, run in several for note in run.notes]
    warnings = [f"{name}: {text}" for name, run in several for text in warnings_of(run)]
    facts = [(name, _said(final_accuracies(run))) for name, run in several]
    sections = [
        _settings(names, runs),
        *([_curves(names, runs)] if any(run.is_run for run in runs) else []),
        _evaluations(names, runs),
        *_paired(names, runs),
        *([_cost(names, runs)] if any(run.is_run for run in runs) else []),
    ]
    subtitle = f"{len(runs)} runs or evaluations; the others are held against {names[0]}."
    return Report("comparison", " against ".join(names), subtitle, facts, warnings, sections, notes)


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """What each is called: its directory's name, with as many of its parents' as tell it from the others."""
    parts = [run.place.resolve().parts for run in runs]
    for depth in range(1, max(len(one) for one in parts) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(one[-1:])} ({place})" for place, one in enumerate(parts, 1)]


def _said(accuracies: list[tuple[str, Cell]]) -> Cell:
    return "; ".join(f"{name} {cell}" for name, cell in accuracies) or "no accuracy was measured"


def _settings(names: Sequence[str], runs: Sequence[RunFiles]) -> Section:
    told = [
        (name, flat_settings(run.settings)) for name, run in zip(names, runs, strict=True) if run.settings
    ]
    if len(told) < 2:
        return Section("settings", "Settings", [Sentence("Fewer than two have settings to compare.")])
    defaults = default_settings()
    keys = dict.fromkeys(key for _, flat in told for key in flat)
    rows = []
    for key in keys:
        values = [flat.get(key, defaults.get(key, "none")) for _, flat in told]
        if len(set(values)) > 1 and key not in _OWN:
            rows.append([key, *values])
    if not rows:
        return Section("settings", "Settings", [Sentence("All settings are the same.")])
    return Section("settings", "Settings that differ", [Table("settings", ["setting", *_of(told)], rows)])


def _of(told: Sequence[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in told]


def _curves(names: Sequence[str], runs: Sequence[RunFiles]) -> Section:
    """Each metric of training, then of each evaluation set, with a curve for each run."""
    sets = dict.fromkeys(prefix for run in runs for prefix in run.eval_sets)
    wanted = [
        (f"{prefix}{key}", _curve_title(title, prefix), unit)
        for prefix in sets
        for key, title, unit in CURVES
    ]
    wanted = [*((key, title, unit) for key, title, unit in CURVES), *wanted]
    blocks: list[Block] = []
    for key, title, unit in wanted:
        # A colour for each run; the ninth begins again, dashed.
        drawn = [
            Curve(name, run.steps, run.values(key), colour=place % len(COLOURS), dashed=place >= len(COLOURS))
            for place, (name, run) in enumerate(zip(names, runs, strict=True))
            if np.isfinite(run.values(key)).any()
        ]
        picture = curves(title, unit, drawn, named=False)
        if picture is None or not any(np.isfinite(curve.values).sum() > 1 for curve in drawn):
            continue
        legend = [(curve.colour, curve.label + (" (dashed)" if curve.dashed else "")) for curve in drawn]
        numbers = {
            curve.label: {"step": curve.steps[told], "value": curve.values[told]}
            for curve in drawn
            for told in [np.isfinite(curve.values)]
        }
        blocks.append(Drawing(key, dataclasses.replace(picture, legend=legend), numbers=numbers))
    if not blocks:
        blocks.append(Sentence("No run has logged two steps, so that there are no curves to draw."))
    blocks.append(_last_values(names, runs, wanted))
    return Section("curves", "Training", blocks)


def _curve_title(title: str, prefix: str) -> str:
    return f"{title} on {set_name(prefix)}"


def _last_values(
    names: Sequence[str], runs: Sequence[RunFiles], wanted: Sequence[tuple[str, str, str]]
) -> Table:
    rows: list[list[Cell]] = []
    for key, title, _ in wanted:
        values = [run.last(key) for run in runs]
        if np.isfinite(values).any():
            rows.append([title, *(Number(value) for value in values)])
    return Table("last", ["last value of", *names], rows, folded="The last value of each curve")


def _sets_of(run: RunFiles) -> dict[str, EvaluatedSet]:
    return {one.name: one for one in run.evaluation.sets} if run.evaluation else {}


def _evaluations(names: Sequence[str], runs: Sequence[RunFiles]) -> Section:
    """A table for each set, a column for each model."""
    sets = [_sets_of(run) for run in runs]
    every = dict.fromkeys(name for one in sets for name in one)
    if not every:
        return Section("evaluation", "Evaluation", [Sentence("None of them has an evaluation.")])
    tables = []
    for set_of in every:
        metrics = [one[set_of].metrics if set_of in one else {} for one in sets]
        rows: list[list[Cell]] = [["pairs", *(Number(of.get("num_pairs"), "count") for of in metrics)]]
        for name, key in MEASURES:
            if any(key in of for of in metrics):
                rows.append([name, *(measured(of, key) for of in metrics)])
        tables.append(Table(f"set:{set_of}", ["measure", *names], rows, title=set_of))
    return Section("evaluation", "Evaluation", tables)


def _paired(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Section]:
    """The first against each other on every set that both were evaluated on."""
    first, *others = [_sets_of(run) for run in runs]
    rows: list[list[Cell]] = []
    untested: list[Block] = []
    drawings: list[Block] = []
    for name, other in zip(names[1:], others, strict=True):
        for set_of in [one for one in first if one in other]:
            a, b = other[set_of].outcomes, first[set_of].outcomes
            if a is None or b is None:
                untested.append(Sentence(f"{set_of}: the scores of {names[0]} or {name} are not at hand."))
                continue
            try:
                test = compare(a, b)
            except ValueError as differ:
                untested.append(Sentence(f"{set_of}, {names[0]} and {name}: no paired test. {differ}"))
                continue
            rows.append([f"{set_of}, {name}", *_cells(test)])
            drawings.append(_agreement(set_of, names[0], name, b, a))
    if not rows and not untested:
        return []
    columns = (
        "set, model", "difference (points)", "p", f"only {names[0]} right", "only model right", "prompts",
        f"accuracy of {names[0]}", "accuracy of model",
    )  # fmt: skip
    tested: list[Block] = [Table("paired", columns, rows), Sentence(_PAIRED)] if rows else []
    return [Section("paired", f"Paired test against {names[0]}", [*tested, *untested, *drawings])]


_PAIRED = (
    "Difference: the model's accuracy minus that of the first, on the same comparisons, with its 95% "
    "interval. p: how likely equally good models part at least that unevenly. Only one right: in prompts."
)


def _cells(test: PairedTest) -> list[Cell]:
    return [
        Number(test.difference, "points", test.low, test.high),
        Number(test.p_value, "p"),
        Number(test.num_only_b, "count"),
        Number(test.num_only_a, "count"),
        Number(test.num_prompts, "count"),
        Number(test.accuracy_b, "percent"),
        Number(test.accuracy_a, "percent"),
    ]


def _agreement(set_name: str, name_a: str, name_b: str, a: Outcomes, b: Outcomes) -> Block:
    picture = agreement(set_name, name_a, name_b, a.margin, b.margin)
    absent = f"{set_name}: fewer than three comparisons, so that their margins are not drawn."
    return Drawing(
        f"agreement:{set_name}:{name_b}", picture, absent, binned(a.margin, b.margin) if picture else None
    )


def _cost(names: Sequence[str], runs: Sequence[RunFiles]) -> Section:
    rows: list[list[Cell]] = []
    for name, run in zip(names, runs, strict=True):
        cost = cost_of(run)
        if cost is None or cost.seconds <= 0:
            continue
        spared = 1 - run.last("num_tokens_computed") / max(run.last("num_tokens"), 1)
        rows.append(
            [
                name,
                Number(cost.pairs, "count"),
                Number(cost.seconds, "seconds"),
                Number(cost.pairs / cost.seconds),
                Number(cost.tokens / cost.seconds, "count"),
                Number(spared, "percent"),
                Number(cost.wait_s / cost.seconds, "percent"),
            ]
        )
    if not rows:
        return Section("cost", "Cost", [Sentence("Nothing was logged that tells of time or tokens.")])
    columns = (
        "run",
        "pairs",
        "time in steps",
        "pairs a second",
        "tokens a second",
        "spared by sharing",
        "wait",
    )
    return Section("cost", "Cost", [Table("cost", columns, rows)])
