"""`rayrm sweep`: the trials of a run file's `[sweep]`, their table and page, and the best one published."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rayrm.runfile import split_words
from rayrm.sweep_settings import read_sweep
from rayrm.table import print_table

if TYPE_CHECKING:
    from rayrm.train.sweep_record import Sweep, Trial


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_sweep)
    parser.add_argument(
        "run",
        nargs="*",
        metavar="sweep.toml key=value",
        help="a run file, with [sweep] or with --param, then settings such as learning_rate=2e-6 or "
        "sweep.num_trials=8, over those of the file",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        help="key=a,b,c (each) or key=log:LOW:HIGH, key=uniform:LOW:HIGH, key=int:LOW:HIGH (drawn); may be "
        "repeated",
    )
    parser.add_argument("--trials", help="sweep.num_trials: draws from the ranges")
    parser.add_argument("--metric", help="sweep.metric: what decides (eval_accuracy)")
    parser.add_argument("--mode", choices=("max", "min"), help="sweep.mode (by the metric: less of a loss)")
    parser.add_argument("--max-concurrent", help="sweep.max_concurrent: trials at once; as many as fit")


def _sweep(options: argparse.Namespace) -> int:
    path, overrides = split_words(options.run)
    flags = {
        "num_trials": options.trials,
        "metric": options.metric,
        "mode": options.mode,
        "max_concurrent": options.max_concurrent,
    }
    words = [f"sweep.{key}={value}" for key, value in flags.items() if value is not None]
    file = read_sweep(path, [*overrides, *words])
    _, settings = file.read()  # before the seconds that torch and ray take to import
    from rayrm.report.sweep import write_sweep_report
    from rayrm.serve.registry import check_published_name, publish
    from rayrm.train.sweep import run_sweep

    if settings.publish is not None:
        check_published_name(settings.publish)
    sweep = run_sweep(file, options.param)
    print_sweep(sweep)
    assert sweep.best is not None
    print(f"\nbest: {' '.join(sweep.best.words)} in {sweep.best.directory}")
    print(f"report: {write_sweep_report(sweep)}")
    if settings.publish is not None:
        published = publish(sweep.best.directory, settings.registry, settings.publish)
        was = "published" if published.is_new else "was already published"
        print(f"{published.name} {published.version} {was}: {published.path}")
    return 0


def print_sweep(sweep: Sweep) -> None:
    """A line for each trial, in their order; then who went on from whom, and why trials failed."""
    rows = [
        (trial.directory.name, *trial.values, _outcome(trial), "best" if trial == sweep.best else "")
        for trial in sweep.trials
    ]
    print_table(("trial", *sweep.trials[0].keys, sweep.metric, ""), rows)
    print_population(sweep)
    for trial in sweep.trials:
        if trial.failure is not None:
            print(f"\n{trial.directory.name} failed: {trial.failure}")


def print_population(sweep: Sweep) -> None:
    """Of population based training who went on from whom, and how the best trial's model came to be."""
    from rayrm.train.sweep_record import handovers, schedule_of, values_of

    keys = sweep.trials[0].keys
    rows = [
        (
            f"{one.at:.0f}%",
            f"{one.left} ({_figure(one.metric)})",
            f"{one.donor} ({_figure(one.donor_metric)})",
            one.name,
            *values_of(one.words),
        )
        for one in handovers(sweep.trials)
    ]
    if not rows:
        return
    print()
    print_table(("at", f"{sweep.metric} of", "goes on from", "as", *keys), rows)
    if sweep.best is not None:
        print("\nthe best one's model was trained")
        stretches = schedule_of(sweep.trials, sweep.best)
        rows = [(f"{one.begin:.0f}-{one.end:.0f}%", one.name, *values_of(one.words)) for one in stretches]
        print_table(("from-to", "in", *keys), rows)


def _figure(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _outcome(trial: Trial) -> str:
    if trial.metric is None:
        return "failed"
    stopped = "" if trial.stopped_at is None else f" (stopped at {trial.stopped_at:.0f}%)"
    return f"{trial.metric:.4f}{stopped}"
