"""`rayrm score`: rows with a prompt and completions -> the same rows with scores, the best ones, or pairs.

Files with `--output` are scored in bulk (`evaluation/bulk_score.py`): by any number of workers, and on from
where a kill cut it off. What comes from stdin, goes to stdout or is scored by a service streams through.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.errors import ConfigError, ScoreError
from rayrm.serve_commands import MODEL, add_registry, model_directory

if TYPE_CHECKING:
    from rayrm.data.tokenize import TextInput
    from rayrm.evaluation.best_of import Selection

_SHOWN_EVERY_S = 0.5
_LINE_EVERY_S = 10.0


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_score)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="MODEL INPUT",
        help=f"{MODEL}, none with --served; then files, directories or globs of jsonl, jsonl.gz or parquet "
        "with prompt and completion(s), or - for stdin",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the file to write, .jsonl, .jsonl.gz or .parquet; the same command goes on where it was cut "
        "off; without it: stdout",
    )
    parser.add_argument("--num-workers", type=int, default=0, help="Ray actors that score (0: this process)")
    parser.add_argument("--column", default="score", help="the name of the new column (score)")
    made = parser.add_mutually_exclusive_group()
    made.add_argument(
        "--best-of",
        action="store_true",
        help="of each prompt the best completion only, with num_completions; a prompt is a row with "
        "completions, or consecutive rows",
    )
    made.add_argument(
        "--pairs",
        action="store_true",
        help="of each prompt its best and worst completion, as chosen and rejected: rows for `rayrm train`",
    )
    parser.add_argument("--min-score", type=float, help="with --best-of: drop prompts whose best is below")
    parser.add_argument("--min-margin", type=float, help="with --pairs: drop pairs that are closer")
    parser.add_argument(
        "--max-bad-row-fraction",
        type=float,
        help="leave out rows that cannot be scored, up to this share, and write them to "
        "OUTPUT.refused.jsonl; without it the first one ends it",
    )
    parser.add_argument("--served", metavar="NAME", help="score by the running service NAME")
    parser.add_argument("--address", help="the Ray cluster of that service, or of the workers")
    parser.add_argument("--rendered", action="store_true", help="strings went through the chat template")
    parser.add_argument("--truncation", choices=("left", "right"), help="cut texts that are too long")
    add_registry(parser)


def _score(options: argparse.Namespace) -> int:
    model, sources = _words(options)
    _check(options, sources)
    if options.output is None or options.served or sources == ["-"]:
        return _stream(options, model, sources)
    directory = str(Path(model_directory(model, options.registry)).absolute())
    from rayrm.evaluation.bulk_score import ScoreSettings, refused_of, score_files
    from rayrm.logs import show_logs

    show_logs()
    settings = ScoreSettings(directory, options.rendered, options.truncation, options.column)
    summary = score_files(
        sources,
        options.output,
        settings,
        selection=_selection(options),
        max_bad_row_fraction=options.max_bad_row_fraction,
        num_workers=options.num_workers,
        address=options.address,
        on_progress=_progress(),
    )
    _tell(options, summary.num_scored, summary.num_written, summary.dropped)
    if summary.num_refused:
        kept = refused_of(options.output)
        print(f"refused {summary.num_refused:,} rows, which are in {kept}", file=sys.stderr)
    return 0


def _words(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The model ("" with --served), and the inputs."""
    words: list[str] = options.words
    if options.served and len(words) == 1:
        return "", words
    if options.served or len(words) < 2:
        wanted = "INPUT alone, with --served NAME" if options.served else "MODEL and INPUT"
        raise ScoreError(f"`rayrm score` takes {wanted}, and got: {' '.join(words)}")
    return words[0], words[1:]


def _check(options: argparse.Namespace, sources: list[str]) -> None:
    """Raise ConfigError for options that do not go together."""
    if options.min_score is not None and not options.best_of:
        raise ConfigError(f"--min-score ({options.min_score:g}) is of the best of a prompt. Add --best-of.")
    if options.min_margin is not None and not options.pairs:
        raise ConfigError(f"--min-margin ({options.min_margin:g}) is of pairs. Add --pairs.")
    if options.num_workers < 0:
        raise ConfigError(f"--num-workers ({options.num_workers}) must be at least 0. Type --num-workers 2.")
    bulk = options.output is not None and not options.served and "-" not in sources
    if "-" in sources and sources != ["-"]:
        raise ConfigError(f"stdin (-) is the only input or none, and got: {' '.join(sources)}")
    for word, value in (
        ("--num-workers", options.num_workers or None),
        ("--max-bad-row-fraction", options.max_bad_row_fraction),
    ):
        if value is not None and not bulk:
            raise ConfigError(
                f"{word} ({value:g}) is for files that a model scores into a file. Give input files and "
                "--output FILE, without --served, or leave it out."
            )
    if options.output is not None:
        _check_output(options.output, sources)
    if not bulk and options.output is not None and options.output.suffix == ".parquet":
        raise ConfigError(
            f"--output ({options.output}): what comes from stdin or is scored by a service is written as "
            "jsonl. Type a name that ends in .jsonl."
        )


def _check_output(output: Path, sources: list[str]) -> None:
    """Raise ConfigError where the output is one of the inputs, or would be one the next time."""
    place = output.expanduser().resolve()
    for source in sources:
        given = Path(source).expanduser().resolve()
        if place == given or given in place.parents:
            raise ConfigError(
                f"--output ({output}) lies where the rows come from ({source}), which it would replace or "
                "add to. Type a name elsewhere."
            )
        if glob.has_magic(source) and str(place) in map(os.path.realpath, glob.glob(source, recursive=True)):
            raise ConfigError(f"--output ({output}) is one of {source}, which are read. Type another name.")
    if not place.parent.is_dir():
        raise ConfigError(f"--output ({output}): type mkdir -p {output.parent}")


def _selection(options: argparse.Namespace) -> Selection:
    from rayrm.evaluation.best_of import Selection

    kind: Any = "best-of" if options.best_of else "pairs" if options.pairs else "rows"
    return Selection(kind, options.column, options.min_score, options.min_margin)


def _stream(options: argparse.Namespace, model: str, sources: list[str]) -> int:
    from rayrm.serve.score_file import as_line, read_lines, read_rows, score_rows, write_whole

    rows = read_lines(sys.stdin.buffer, "stdin") if sources == ["-"] else read_rows(sources)
    scored = score_rows(rows, _scorer(options, model), rendered=options.rendered, column=options.column)
    counted: Counter[str] = Counter()
    dropped: Counter[str] = Counter()

    def counting() -> Iterator[dict[str, Any]]:
        for row in scored:
            counted["rows"] += 1
            yield row

    selected = _selection(options).of(counting(), dropped)
    if options.output is not None:
        num_written = write_whole(selected, options.output)
        _tell(options, counted["rows"], num_written, dropped)
        return 0
    num_written = 0
    for row in selected:
        sys.stdout.write(as_line(row))
        num_written += 1
    if options.best_of or options.pairs:
        _tell(options, counted["rows"], num_written, dropped)
    return 0


def _tell(options: argparse.Namespace, num_scored: int, num_written: int, dropped: Counter[str]) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the progress line
    into = "stdout" if options.output is None else options.output
    if options.best_of or options.pairs:
        what = "pairs" if options.pairs else "best completions"
        print(f"scored {num_scored:,} rows; wrote {num_written:,} {what} into {into}", file=sys.stderr)
        for reason, count in dropped.most_common():
            print(f"  left out {count:,}: {reason}", file=sys.stderr)
    else:
        print(f"scored {num_scored:,} rows into {into}", file=sys.stderr)


def _progress() -> Callable[[int, int], None]:
    """Rewrites one line of a terminal; elsewhere it adds a line now and then."""
    live = sys.stderr.isatty()
    began = shown = 0.0
    first: int | None = None

    def show(done: int, before: int) -> None:
        nonlocal began, shown, first
        if done == before:
            return  # what an earlier process did, being counted
        now = time.monotonic()
        if first is None:  # a second is one of scoring, not of starting workers
            first, began, shown = done, now, now
            if before:
                print(f"going on after {before:,} rows", file=sys.stderr, flush=True)
        if now - shown > (_SHOWN_EVERY_S if live else _LINE_EVERY_S):
            shown = now
            start, end = ("\r", "") if live else ("", "\n")
            rate = (done - first) / (now - began)
            print(f"{start}scored {done:,} rows, {rate:,.0f} a second", end=end, file=sys.stderr, flush=True)

    return show


def _scorer(options: argparse.Namespace, model_word: str) -> Any:
    """Inputs -> scores: by the running service, or by the model in this process."""
    if options.served is not None:
        from rayrm.serve.client import RewardClient
        from rayrm.serve.connect import connect

        connect(options.address, start=False)
        client = RewardClient(options.served)

        def by_service(inputs: list[TextInput]) -> list[float]:
            return client.score_inputs(inputs, truncation=options.truncation).scores

        return by_service
    directory = model_directory(model_word, options.registry)
    from rayrm.evaluation.bulk_score import ScoreSettings
    from rayrm.logs import show_logs

    show_logs()
    return ScoreSettings(directory, options.rendered, options.truncation).load()
