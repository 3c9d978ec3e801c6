"""`rayrm evaluate`: what a model is on any number of sets, as a table; kept with `--output`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.errors import ConfigError, RunDirectoryError
from rayrm.runfile import split_settings
from rayrm.serve_commands import MODEL, add_registry, model_directory
from rayrm.table import print_table

if TYPE_CHECKING:
    from rayrm.train.evaluation_record import EvaluationRecord, SetEvaluation

ALL = "all"
_MOST_GROUPS = 40


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_evaluate)
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="paths, globs or hub names; words such as tie_model=davidson measure by another objective than "
        "the model's",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep the evaluation here, for `rayrm report` and the gate; cut off, the same command goes on",
    )
    parser.add_argument("--against", metavar="MODEL", help="also this model, and which of both is better")
    parser.add_argument(
        "--consistency",
        type=int,
        default=0,
        metavar="ROWS",
        help="also whether preferences outlast harmless changes (a space at the end, Markdown taken off and "
        "the like), on the first rows of each set",
    )
    parser.add_argument("--max-pairs", type=int, help="only the first rows of each source")
    parser.add_argument("--max-bad-row-fraction", type=float, default=0.01, help="default: 0.01")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=0,
        help="processes that score, each with a GPU or a CPU of the cluster; 0: this one",
    )
    parser.add_argument(
        "--json", type=Path, help="also write here what training logs of an evaluation (--output keeps all)"
    )
    add_registry(parser)


def _evaluate(options: argparse.Namespace) -> int:
    sources, objective = split_settings(options.data)
    models = [model_directory(options.model, options.registry)]
    if options.against is not None:
        models.append(model_directory(options.against, options.registry))
    from rayrm.evaluation.evaluate import evaluate
    from rayrm.metrics.names import logged_of
    from rayrm.train.evaluation_record import write_evaluation

    if options.output is not None:
        _check_free(options.output, models[0], sources)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"`--json` ({options.json}): type mkdir -p {options.json.parent}")
    records = []
    for place, model in enumerate(models):
        output = None if options.output is None or place else options.output
        with _progress_line("scoring" if len(models) == 1 else f"{model}: scoring") as show:
            record = evaluate(
                model,
                sources,
                objective=objective,
                max_pairs=options.max_pairs,
                max_bad_row_fraction=options.max_bad_row_fraction,
                num_workers=options.num_workers,
                consistency_rows=options.consistency,
                keep=None if output is None else output / ".partial",
                on_progress=show,
            )
        if output is not None:
            write_evaluation(record, output)
        records.append(record)
    print_evaluation(records[0])
    if len(records) > 1:
        _print_against(records[0], records[1])
    if options.output is not None:
        print(f"\nkept in {options.output}: type `rayrm report {options.output}` for a page of it")
    if options.json is not None:
        metrics = {name: logged_of(one.metrics) for name, one in records[0].sets.items()}
        options.json.write_text(json.dumps(metrics, indent=2) + "\n")
    return 0


def _check_free(output: Path, model: str, sources: Sequence[str]) -> None:
    """Raise RunDirectoryError where `output` is a run's, holds another evaluation, or is no directory."""
    from rayrm.train.evaluation_record import EVALUATION, read_evaluation

    if (output / "run.toml").is_file():
        raise RunDirectoryError(
            f"`--output` ({output}) is the directory of a run. Type another, such as {output / 'heldout'}."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"`--output` ({output}) can be no directory ({error.strerror}). Choose another."
        ) from error
    if not (output / EVALUATION).is_file():
        return
    before = read_evaluation(output)
    # A run's own record calls it by its name alone.
    if Path(before.model).name != Path(model).name or not {*sources} <= {*before.sets}:
        raise RunDirectoryError(
            f"`--output` ({output}) holds the evaluation of {before.model} on {', '.join(before.sets)}, and "
            "it would be lost. Choose another directory."
        )


def print_evaluation(record: EvaluationRecord) -> None:
    """A line for each set, a table of its groups where its rows name any, and on stderr what to look at."""
    metrics = {name: one.metrics for name, one in record.sets.items()}
    # A ranking makes several pairs of one row; of pairs alone the two counts are the same.
    counts = {"rows": "num_rows", "pairs": "num_pairs"}
    if all(found["num_rows"] == found["num_pairs"] for found in metrics.values()):
        del counts["rows"]
    columns = {
        "accuracy": ("accuracy", "{accuracy:.3f}"),
        "95% interval": ("accuracy", "{accuracy_low:.3f} .. {accuracy_high:.3f}"),
        "longer wins": ("accuracy", "{length_baseline_accuracy:.3f}"),
        "loss": ("loss", "{loss:.4f}"),
        "margin": ("accuracy", "{margin:+.3f}"),
    }
    # Of what compares, and of soft labels, ties, rankings and completions that have scores.
    rare = {
        "ECE": ("ece", "{ece:.3f}"),
        "temperature": ("temperature", "{temperature:.2f}"),
        "length-controlled": ("length_controlled_accuracy", "{length_controlled_accuracy:.3f}"),
        "margin~length": ("length_margin_correlation", "{length_margin_correlation:+.2f}"),
        "brier": ("brier", "{brier:.4f}"),
        "ties": ("tie_accuracy", "{tie_accuracy:.3f}"),
        "top": ("top_accuracy", "{top_accuracy:.3f}"),
        "mse": ("mse", "{mse:.4f}"),
        "pearson": ("pearson", "{pearson:.3f}"),
    }
    shown = columns | {
        column: form for column, form in rare.items() if any(form[0] in found for found in metrics.values())
    }
    print_table(
        ("source", *counts, *shown),
        [
            (
                name,
                *(f"{found[count]:.0f}" for count in counts.values()),
                *(form.format(**found) if needed in found else "-" for needed, form in shown.values()),
            )
            for name, found in metrics.items()
        ],
    )
    for name, one in record.sets.items():
        if name != ALL:
            _print_groups(name, one)
    for name, one in record.sets.items():
        if one.benchmark is not None:
            _print_benchmark(name, one.benchmark)
        _print_consistency(name, one)
    for name, one in record.sets.items():
        for finding in one.findings:
            print(f"rayrm: {name}: {finding}", file=sys.stderr)


def _print_groups(name: str, one: SetEvaluation) -> None:
    if len(one.groups) < 2:
        return
    groups = sorted(one.groups.items(), key=lambda pair: pair[1]["accuracy"])
    print(f"\n{name}, by group, the worst first:")
    print_table(
        ("group", "pairs", "accuracy", "95% interval", "longer wins"),
        [
            (
                group,
                f"{found['num_pairs']:.0f}",
                f"{found['accuracy']:.3f}",
                f"{found['accuracy_low']:.3f} .. {found['accuracy_high']:.3f}",
                f"{found['length_baseline_accuracy']:.3f}",
            )
            for group, found in groups[:_MOST_GROUPS]
        ],
    )
    if len(groups) > _MOST_GROUPS:
        print(f"... and {len(groups) - _MOST_GROUPS} more (--output DIR keeps all)")


def _print_benchmark(name: str, benchmark: Mapping[str, Any]) -> None:
    """The benchmark's own tables, its score, and what to know beside them."""
    from rayrm.evaluation.benchmark_result import printed

    score = benchmark["metrics"].get("score")
    print(f"\n{name} is {benchmark['name']}" + ("" if score is None else f": score {score:.4f}"))
    for title, table in benchmark["tables"].items():
        print(f"{title}:")
        print_table(*printed(table))
    for note in benchmark["notes"]:
        print(f"rayrm: {name}: {note}", file=sys.stderr)


def _print_consistency(name: str, one: SetEvaluation) -> None:
    begin, end = "consistency_", "_kept"
    changes = [
        key[len(begin) : -len(end)] for key in one.metrics if key.startswith(begin) and key.endswith(end)
    ]
    if not changes:
        return
    print(f"\n{name}: preferences that outlast harmless changes:")
    figures = one.metrics
    print_table(
        ("change", "rows", "kept", "95% interval", "scores move by (sd)"),
        [
            (
                change.replace("_", " "),
                f"{figures[f'{begin}{change}_num_rows']:.0f}",
                f"{figures[f'{begin}{change}_kept']:.3f}",
                f"{figures[f'{begin}{change}_kept_low']:.3f} .. {figures[f'{begin}{change}_kept_high']:.3f}",
                f"{figures.get(f'{begin}{change}_shift', 0.0):+.3f}",
            )
            for change in changes
        ],
    )


def _print_against(first: EvaluationRecord, second: EvaluationRecord) -> None:
    from rayrm.metrics.comparison import compare

    print(f"\n{first.model} against {second.model}, the same pairs:")
    rows = []
    for name, one in first.sets.items():
        found = compare(one.outcomes, second.sets[name].outcomes)
        rows.append(
            (
                name,
                f"{found.accuracy_a:.3f}",
                f"{found.accuracy_b:.3f}",
                f"{found.difference:+.3f}",
                f"{found.low:+.3f} .. {found.high:+.3f}",
                f"{found.p_value:.3g}",
                f"{found.num_only_a} / {found.num_only_b}",
            )
        )
    print_table(("source", "first", "second", "difference", "95% interval", "p", "only one right"), rows)


@contextmanager
def _progress_line(what: str) -> Iterator[Any]:
    """A function of (name, done, total) that rewrites one line of a terminal; elsewhere it adds lines."""
    live = sys.stderr.isatty()

    def show(name: str, done: int, total: int) -> None:
        end = "" if live and done < total else "\n"
        start = "\r" if live else ""
        print(f"{start}{what} {name}: {done:,}/{total:,} pairs", end=end, file=sys.stderr, flush=True)

    yield show
