"""A sweep as a page: `sweep.html` beside its trials, one file that loads nothing."""

from __future__ import annotations

from pathlib import Path

from rayrm.report.page import write_page
from rayrm.report.sweep_figures import Point, by_parameter, over_steps, parallel_coordinates
from rayrm.train.sweep_record import REPORT, Sweep, curve_of_trial, handovers, schedule_of, values_of


def write_sweep_report(sweep: Sweep) -> Path:
    """Write the page of a sweep into its directory: the best trial, pictures, and a table of all.

    Raises RunDirectoryError where the disk takes no file.
    """
    keys = sweep.trials[0].keys
    points = [
        Point(
            trial.directory.name,
            trial.values,
            trial.metric,
            stopped=trial.stopped_at is not None,
            best=trial == sweep.best,
            curve=curve_of_trial(trial, sweep.metric),
        )
        for trial in sweep.trials
        if trial.metric is not None
    ]
    drawn = [by_parameter(key, place, sweep.metric, points) for place, key in enumerate(keys)]
    wide = [parallel_coordinates(keys, sweep.metric, points), over_steps(sweep.metric, points)]
    return write_page(
        sweep.home / REPORT,
        "sweep.html",
        name=sweep.home.name,
        sweep=sweep,
        keys=keys,
        num_failed=sum(trial.metric is None for trial in sweep.trials),
        num_stopped=sum(trial.stopped_at is not None for trial in sweep.trials),
        wide=[picture for picture in wide if picture is not None],
        drawn=[picture for picture in drawn if picture is not None],
        handovers=[(one, values_of(one.words)) for one in handovers(sweep.trials)],
        schedule=[
            (one, values_of(one.words))
            for one in (schedule_of(sweep.trials, sweep.best) if sweep.best else [])
        ],
        notes=[],
    )
