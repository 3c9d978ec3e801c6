"""`rayrm report`: the pages of training runs and evaluations, or of several beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rayrm.errors import ConfigError, RunDirectoryError


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_report)
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="RUN",
        help="directories of `rayrm train`, `rayrm rl` or `rayrm evaluate --output`",
    )
    parser.add_argument("--compare", action="store_true", help="one page of all, held against the first")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE|DIR",
        help="where the page goes, a name ending in .html or a directory; .md and .json stand beside it "
        "(report.html in each RUN; with --compare: comparison.html here)",
    )


def _report(options: argparse.Namespace) -> int:
    directories: list[str] = options.directories
    if options.compare:
        from rayrm.report.compare import COMPARISON, write_comparison

        print(f"report: {write_comparison(directories, _page(options.output or Path(), COMPARISON))}")
        return 0
    if options.output is not None and len(directories) > 1:
        raise ConfigError(
            f"`--output` ({options.output}) names one place, and there are {len(directories)} reports. Give "
            "one RUN with it, or --compare; without it each report goes into its RUN."
        )
    failed = False
    for directory in directories:
        try:
            print(f"report: {_write(Path(directory), options.output)}")
        except RunDirectoryError as error:
            if len(directories) == 1:
                raise
            print(f"rayrm: error: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def _write(directory: Path, output: Path | None) -> Path:
    from rayrm.report.run import REPORT, write_run_report

    if _is_rl(directory):
        from rayrm.report.rl import write_rl_report

        if output is not None:
            raise ConfigError(f"`--output` ({output}): the report of an RL run stands in it. Leave it out.")
        return write_rl_report(directory)
    return write_run_report(directory, None if output is None else _page(output, REPORT))


def _is_rl(directory: Path) -> bool:
    """By its settings, which have a policy."""
    from rayrm.runfile import sections_of

    try:
        return "policy" in sections_of(directory / "run.toml")
    except ConfigError:  # missing or damaged: the report itself says so
        return False


def _page(output: Path, name: str) -> Path:
    """The page's path: `output` itself where it ends in .html, else `name` in it as a directory."""
    if output.suffix == ".html":
        if not output.parent.is_dir():
            raise RunDirectoryError(f"`{output.parent}` is no directory. Type: mkdir -p {output.parent}")
        return output
    if output.exists() and not output.is_dir():
        raise RunDirectoryError(
            f"`--output` ({output}) is a file. Type a name that ends in .html, or a directory."
        )
    output.mkdir(parents=True, exist_ok=True)
    return output / name
