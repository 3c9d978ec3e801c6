"""The parts of a report that tell of training: settings, data, curves and cost, from a run's directory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrm.report.document import Block, Cell, Drawing, Number, Section, Sentence, Table
from rayrm.report.figures import SMOOTHED_FROM, Curve, Picture, curves
from rayrm.report.run_files import RunFiles
from rayrm.runfile import SECTIONS

CURVES = (
    ("loss", "Loss", "mean over rows"),
    ("accuracy", "Accuracy", "share of comparisons that are right"),
    ("margin", "Margin", "score of chosen minus score of rejected"),
    ("mse", "Squared error", "mean, of scored completions"),
    ("learning_rate", "Learning rate", "size of an update's step"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("pairs_per_second", "Throughput", "pairs a second"),
    ("data_wait_s", "Wait for data", "seconds in a logging interval"),
)
"""Key in the log, title, unit: what a run's curves are, in their order."""
_MOST_SETS = 7


_RESOLVED = {"disable_tqdm": "false", "do_eval": "true", "pad_to_multiple_of": "none", "shuffle": "true"}
"""What a run makes of defaults that are decided when it begins."""


def settings_section(run: RunFiles) -> Section:
    """What the run was told: first what differs from the defaults, then all of it."""
    if run.settings is None:
        return Section("settings", "Settings", [Sentence("run.toml is not at hand: see the notes below.")])
    flat = flat_settings(run.settings)
    defaults = default_settings()
    changed = [
        (key, value, defaults.get(key, "none"))
        for key, value in flat.items()
        if value not in (defaults.get(key), _RESOLVED.get(key))
    ]
    blocks: list[Block] = [
        Table("changed", ("setting", "value", "default"), changed)
        if changed
        else Sentence("Every setting has its default."),
        Table("all", ("setting", "value"), list(flat.items()), folded=f"All {len(flat)} settings"),
    ]
    return Section("settings", "Settings", blocks)


def flat_settings(tables: dict[str, Any]) -> dict[str, str]:
    """Settings as `section.key` -> the value as people type it; those of `[reward]` by their key alone."""
    flat: dict[str, str] = {}

    def add(head: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{head}.{key}" if head else key, inner)
        else:
            flat[head.removeprefix("reward.")] = value_text(value)

    add("", tables)
    return flat


def value_text(value: Any) -> str:
    """One setting's value: true, 0.001, a path, a list's members."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(value_text(one) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} = {value_text(one)}" for key, one in value.items()) or "none"
    return "none" if value is None else str(value)


def default_settings() -> dict[str, str]:
    """The defaults of a run file's sections, as `flat_settings` has values."""
    tables: dict[str, dict[str, Any]] = {}
    for section, kind in SECTIONS.items():
        tables[section] = {}
        for one in dataclasses.fields(kind):
            made = one.default
            if one.default_factory is not dataclasses.MISSING:
                made = one.default_factory()
            if made is not dataclasses.MISSING and made is not None:
                tables[section][one.name] = made
    return flat_settings(tables)


def data_section(run: RunFiles) -> Section:
    """Which sources, what of them was refused and why, and how long a pair is."""
    data = (run.settings or {}).get("data") or {}
    rows: list[tuple[Cell, Cell]] = []
    for key, name in (("train", "training"), ("eval", "evaluation")):
        rows += [(name, source) for source in source_names(data.get(key))]
    blocks: list[Block] = [Table("sources", ("for", "source"), rows)] if rows else []
    if not rows:
        blocks.append(Sentence("The settings name no source of data."))
    cost = cost_of(run)
    if cost is not None and cost.pairs > 0:
        counts = [Number(value, "count") for value in (cost.pairs, cost.tokens, cost.tokens / cost.pairs)]
        columns = ("pairs trained on", "tokens of both sides", "mean tokens of a pair")
        blocks.append(Table("lengths", columns, [counts]))
    blocks += _refused(run)
    return Section("data", "Data", blocks)


def source_names(told: Any) -> list[str]:
    """The sources of `data.train` or `data.eval`, in whichever of their forms they are written."""
    if told is None:
        return []
    if isinstance(told, list):
        return [name for one in told for name in source_names(one)]
    if isinstance(told, dict):
        if "path" in told:
            rest = {key: value for key, value in told.items() if key != "path"}
            return [value_text(told["path"]) + (f" ({value_text(rest)})" if rest else "")]
        return [f"{key}: {name}" for key, one in told.items() for name in source_names(one)]
    return [str(told)]


def _refused(run: RunFiles) -> list[Block]:
    if not run.refused:
        return [Sentence("No row was refused.")]
    reasons = list(Counter(reason for _, reason in run.refused.elements()))
    by_source: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(run.refused.items()):
        by_source.setdefault(source, {})[reason] = count
    rows: list[Sequence[Cell]] = [
        (source, *(Number(counts.get(reason, 0), "count") for reason in reasons))
        for source, counts in by_source.items()
    ]
    return [Table("refused", ("source", *reasons), rows, title="Refused rows by reason")]


@dataclass(frozen=True, slots=True)
class Cost:
    """What the logged steps took: `wait_s` of `seconds` went by until a step's data was there."""

    seconds: float
    pairs: float
    tokens: float
    wait_s: float


def cost_of(run: RunFiles) -> Cost | None:
    """By the log's rates: an interval took its tokens divided by the tokens of a second. None: no rate."""
    tokens, rate = run.values("num_tokens"), run.values("tokens_per_second")
    told = np.isfinite(tokens) & np.isfinite(rate) & (rate > 0)
    if not told.any():
        return None
    spent = np.diff(tokens[told], prepend=0.0)
    seconds = spent / rate[told]
    pairs = np.nansum(seconds * run.values("pairs_per_second")[told])
    wait = np.nansum(run.values("data_wait_s")[told])
    return Cost(float(seconds.sum()), float(pairs), float(spent.sum()), float(wait))


def last_step(run: RunFiles) -> int:
    """The last step that is known to be done; 0: none is."""
    logged = int(run.steps[-1]) if len(run.steps) else 0
    told = (run.progress or {}).get("step")
    return max(logged, told if isinstance(told, int) else 0)


def curves_section(run: RunFiles) -> Section:
    """The training curves, with the evaluations during the run over them."""
    trained = _told(run, [key for key, _, _ in CURVES])
    evaluated = _told(run, [f"{prefix}loss" for prefix in run.eval_sets])
    if not trained and not evaluated:
        text = "Nothing was logged yet, so that there are no curves to draw."
        return Section("curves", "Training", [Sentence(text)])
    blocks: list[Block] = []
    if len(trained | evaluated) == 1:
        step = next(iter(trained | evaluated))
        blocks.append(Sentence(f"Only step {step} was logged: one point makes no curve. Its values:"))
    else:
        absent = []
        for key, title, unit in CURVES:
            picture = _curve(run, key, title, unit)
            if picture is None:
                absent.append(title.lower())
                continue
            blocks.append(Drawing(key, picture, numbers=_curve_numbers(run, key)))
        if len(trained) >= SMOOTHED_FROM:
            blocks.insert(0, Sentence("Thin lines: as logged; thick: their running mean."))
        absent = [title for title in absent if title != "squared error"]
        if absent:
            blocks.append(Sentence(f"Not in this run's log: {', '.join(absent)}."))
    blocks.append(_ends_table(run, one_step=len(trained | evaluated) == 1))
    if not run.eval_sets:
        blocks.append(Sentence("No set was evaluated during training (`eval_strategy`)."))
    return Section("curves", "Training", blocks)


def _told(run: RunFiles, keys: Sequence[str]) -> set[int]:
    """The steps at which any of the keys was logged."""
    return {int(step) for key in keys for step in run.steps[np.isfinite(run.values(key))]}


def _curve(run: RunFiles, key: str, title: str, unit: str) -> Picture | None:
    drawn = [Curve("training", run.steps, run.values(key))]
    shown = [prefix for prefix in run.eval_sets if np.isfinite(run.values(prefix + key)).any()]
    for place, prefix in enumerate(shown[:_MOST_SETS], 1):
        drawn.append(Curve(set_name(prefix), run.steps, run.values(prefix + key), colour=place, dashed=True))
    picture = curves(title, unit, drawn, named=False)
    if picture is None or len(drawn) == 1:
        return picture
    more = len(shown) - _MOST_SETS
    caption = "Dashed: evaluations." + (f" {more} more sets are in the table." if more > 0 else "")
    legend = [(curve.colour, curve.label) for curve in drawn if np.isfinite(curve.values).any()]
    return dataclasses.replace(picture, legend=legend, caption=caption)


def set_name(prefix: str) -> str:
    """An evaluation set as a legend names it, of the prefix of its metrics."""
    return prefix.removeprefix("eval_").rstrip("_") or "evaluation"


def _curve_numbers(run: RunFiles, key: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix in ("", *run.eval_sets):
        values = run.values(prefix + key)
        told = np.isfinite(values)
        if told.any():
            name = set_name(prefix) if prefix else "training"
            found[name] = {"step": run.steps[told], "value": values[told]}
    return found


def _ends_table(run: RunFiles, *, one_step: bool) -> Table:
    rows: list[list[Cell]] = []
    for key, title, _ in CURVES:
        for prefix in ("", *run.eval_sets):
            values = run.values(prefix + key)
            told = values[np.isfinite(values)]
            if len(told):
                name = f"{title}, {set_name(prefix)}" if prefix else title
                ends = (told[-1],) if one_step else (told[0], told[-1], told.min(), told.max())
                rows.append([name, *(Number(float(value)) for value in ends)])
    if one_step:
        return Table("ends", ("curve", "value"), rows)
    folded = "First, last, least and most of each curve"
    return Table("ends", ("curve", "first", "last", "least", "most"), rows, folded=folded)


def cost_section(run: RunFiles) -> Section:
    """What the run took: rates, tokens that sharing spared, the wait for data, time."""
    rows: list[tuple[Cell, Cell]] = []
    cost = cost_of(run)
    if cost is not None and cost.seconds > 0:
        rows += [
            ("time in steps", Number(cost.seconds, "seconds")),
            ("pairs a second", Number(cost.pairs / cost.seconds)),
            ("tokens a second", Number(cost.tokens / cost.seconds, "count")),
            ("wait for data, of that time", Number(cost.wait_s / cost.seconds, "percent")),
        ]
    whole, computed = run.last("num_tokens"), run.last("num_tokens_computed")
    if np.isfinite(whole) and np.isfinite(computed) and whole > 0:
        rows += [
            ("tokens of all pairs", Number(whole, "count")),
            ("tokens computed", Number(computed, "count")),
            ("tokens spared by sharing beginnings", Number(1 - computed / whole, "percent")),
        ]
    if np.isfinite(run.last("train_runtime")):
        text = "time since its last start, evaluation and saving included"
        rows.append((text, Number(run.last("train_runtime"), "seconds")))
    if not rows:
        return Section("cost", "Cost", [Sentence("Nothing was logged yet that tells of time or tokens.")])
    return Section("cost", "Cost", [Table("cost", ("", "value"), rows)])
