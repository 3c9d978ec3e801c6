"""A training run, or an evaluation, as a page: `report.html`, and `report.md` and `report.json` beside it.

What a reviewer must not miss stands on top: what the evaluation found, a run that did not end, steps left
out, rows refused, and an evaluation loss that rose again. The same directory gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rayrm.data.quarantine import FILTERED
from rayrm.report.document import Cell, Number, Report, write_report
from rayrm.report.evaluation_sections import evaluation_sections, measured
from rayrm.report.run_files import RunFiles, read_run_files
from rayrm.report.run_sections import (
    cost_of,
    cost_section,
    curves_section,
    data_section,
    last_step,
    set_name,
    settings_section,
    source_names,
)

REPORT = "report.html"
_RISEN = 1.05
_MANY_REFUSED = 0.01
_MANY_FILTERED = 0.1
_LONG_WAIT = 0.1
_SETS_ON_TOP = 3
_LONGEST_FACT = 60


def write_run_report(directory: str | Path, page: str | Path | None = None) -> Path:
    """Write the report of a run's or an evaluation's directory, over the one before; the page's path.

    `page`: where it goes instead of `<directory>/report.html`; `.md` and `.json` stand beside it.

    Raises:
        RunDirectoryError: the directory holds neither a run nor an evaluation, or the disk takes no file.
    """
    run = read_run_files(directory)
    return write_report(report_of(run), Path(page) if page is not None else run.place / REPORT)


def report_of(run: RunFiles) -> Report:
    """What there is to say of a run, an evaluation, or both."""
    if run.is_run:
        absent = (
            "The finished model was not evaluated on its own. Type: rayrm evaluate "
            f"{run.place} DATA --output {run.place}/evaluation"
        )
        sections = [
            settings_section(run),
            data_section(run),
            curves_section(run),
            *evaluation_sections(run.evaluation, absent),
            cost_section(run),
        ]
    else:
        sections = evaluation_sections(run.evaluation, "")
    return Report(
        "training run" if run.is_run else "evaluation",
        run.name,
        _subtitle(run),
        _facts(run),
        warnings_of(run),
        sections,
        run.notes,
    )


def _subtitle(run: RunFiles) -> str:
    if not run.is_run:
        assert run.evaluation is not None
        when = f", made {run.evaluation.created}" if run.evaluation.created else ""
        return f"A reward model's evaluation{when}."
    if not run.records:
        return "A reward model's training run; nothing was logged yet."
    events = f"{len(run.records)} step{'s' if len(run.records) > 1 else ''} with a logging event"
    return f"A reward model's training run; {events}, the last at step {int(run.steps[-1])}."


def _facts(run: RunFiles) -> list[tuple[str, Cell]]:
    facts: list[tuple[str, Cell]] = []
    settings = run.settings or {}
    model = (settings.get("model") or {}).get("name") or (run.evaluation and run.evaluation.model)
    if model:
        facts.append(("model", str(model)))
    if run.evaluation and run.evaluation.version:
        facts.append(("version", run.evaluation.version))
    train = source_names((settings.get("data") or {}).get("train"))
    if train:
        more = f" and {len(train) - 1} more" if len(train) > 1 else ""
        first = train[0] if len(train[0]) <= _LONGEST_FACT else f"{train[0][: _LONGEST_FACT - 1]}…"
        facts.append(("data", f"{first}{more}"))
    cost = cost_of(run)
    if cost is not None:
        facts.append(("pairs trained on", Number(cost.pairs, "count")))
    if run.is_run:
        facts.append(("steps", _steps(run)))
    return facts + final_accuracies(run)


def _steps(run: RunFiles) -> Cell:
    of = (run.progress or {}).get("num_steps")
    done = last_step(run)
    return f"{done:,} of {of:,}" if isinstance(of, int) and of != done else Number(done, "count")


def final_accuracies(run: RunFiles) -> list[tuple[str, Cell]]:
    """The accuracy that a run ended with: of its evaluation, else of evaluations during training, else of
    the last training rows; each with its name, and its interval where it has one."""
    if run.evaluation and run.evaluation.sets:
        sets = run.evaluation.sets[:_SETS_ON_TOP]
        return [(f"accuracy on {one.name}", measured(one.metrics, "accuracy")) for one in sets]
    found: list[tuple[str, Cell]] = []
    for prefix in run.eval_sets[:_SETS_ON_TOP]:
        value, low, high = (run.last(f"{prefix}accuracy{end}") for end in ("", "_low", "_high"))
        if np.isfinite(value):
            found.append((f"accuracy on {set_name(prefix)}", Number(value, "percent", low, high)))
    if not found and np.isfinite(run.last("accuracy")):
        found.append(("accuracy on the last training rows", Number(run.last("accuracy"), "percent")))
    return found


def warnings_of(run: RunFiles) -> list[str]:
    """Sentences that a reviewer should not miss; the evaluation's own findings come first."""
    sets = run.evaluation.sets if run.evaluation else []
    several = len(sets) > 1
    found = [f"{one.name}: {text}" if several else text for one in sets for text in one.findings]
    if run.is_run:
        found += [
            text
            for text in (
                _unfinished(run),
                _skipped(run),
                *_risen(run),
                _refused(run),
                _filtered(run),
                _waited(run),
            )
            if text
        ]
    return found


def _unfinished(run: RunFiles) -> str:
    if run.progress is None or run.progress.get("finished") is True:
        return ""
    return f"The run has not finished: step {last_step(run):,} of {run.progress.get('num_steps', '?')}."


def _skipped(run: RunFiles) -> str:
    num = np.nansum(run.values("skipped_steps")) if run.records else 0.0
    steps = "1 step was" if num == 1 else f"{num:.0f} steps were"
    return f"{steps} left out for a loss that was not finite." if num else ""


def _risen(run: RunFiles) -> list[str]:
    """Evaluation losses that ended well above their least, as of a model that learns its rows by heart."""
    found = []
    for prefix in run.eval_sets:
        values = run.values(f"{prefix}loss")
        told = np.flatnonzero(np.isfinite(values))
        least = told[np.argmin(values[told])]
        last = told[-1]
        if len(told) > 2 and values[last] > _RISEN * values[least] > 0:
            found.append(
                f"The loss on {set_name(prefix)} was least at step {int(run.steps[least])} "
                f"({values[least]:.4g}) and rose to {values[last]:.4g}: the model may have learned its "
                "rows by heart since."
            )
    return found


def _refused(run: RunFiles) -> str:
    """Rows above `max_length` are filtered as was asked; of others more than a hundredth is told."""
    refused = sum(n for (_, reason), n in run.refused.items() if reason not in FILTERED)
    cost = cost_of(run)
    if cost is None or refused <= _MANY_REFUSED * cost.pairs:
        return ""
    rows = "1 row was" if refused == 1 else f"{refused:,} rows were"
    return f"{rows} refused, beside {cost.pairs:,.0f} pairs that were trained on."


def _filtered(run: RunFiles) -> str:
    """As was asked for, by `max_length`: told where it is many beside what was trained on."""
    left_out = sum(n for (_, reason), n in run.refused.items() if reason == "too-long")
    cost = cost_of(run)
    if cost is None or left_out <= _MANY_FILTERED * cost.pairs:
        return ""
    return f"{left_out:,} rows are longer than `max_length` and were left out (see Data)."


def _waited(run: RunFiles) -> str:
    cost = cost_of(run)
    if cost is None or cost.wait_s <= _LONG_WAIT * cost.seconds:
        return ""
    return f"Training waited for data {cost.wait_s / cost.seconds:.0%} of its time."
