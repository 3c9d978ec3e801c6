"""`rayrm data inspect`: preference data looked at before a run. No Ray, no model: only its tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayrm.errors import ConfigError, ModelError

_SHOWN_EVERY_S = 0.5


def add_data(parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The words of `rayrm data`; `shared` holds what every command takes."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "Rows, lengths, repeats and conflicts of preference data, and what a run would make of it."
    inspect = commands.add_parser("inspect", help=what, description=what, parents=[shared])
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("paths", nargs="+", metavar="PATH", help="files, directories, globs or hub names")
    inspect.add_argument("--model", help="directory or hub name of the tokenizer; not for tokenized rows")
    inspect.add_argument("--chat-template-path", help="the chat template, where the tokenizer has none")
    inspect.add_argument("--max-length", type=int, default=1024, help="the run's max_length (1024)")
    inspect.add_argument("--max-rows", type=int, help="only the first rows of each source")
    inspect.add_argument("--columns", default="", help="column names: prompt=question,chosen=good")
    inspect.add_argument("--json", type=Path, help="also write all figures here")


def _inspect(options: argparse.Namespace) -> int:
    columns = columns_of(options.columns)
    if options.max_length < 1:
        raise ConfigError(
            f"`--max-length` ({options.max_length}) must be at least 1. Type: --max-length 1024"
        )
    from rayrm.data.inspect import GivenIds, figures_by_source, gather
    from rayrm.data.inspect_text import report, warnings

    tokenizer: Any = GivenIds() if options.model is None else _tokenizer(options)
    gathered = gather(
        options.paths, tokenizer, columns=columns, max_rows=options.max_rows, on_progress=_progress()
    )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the progress line
    figures = figures_by_source(gathered, options.max_length)
    print(report(figures), end="")
    if options.json is not None:
        told = [{**dataclasses.asdict(one), "warnings": warnings(one)} for one in figures]
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0


def columns_of(words: str) -> dict[str, str]:
    """`prompt=question,chosen=good` as our names -> the source's."""
    pairs = [word.partition("=") for word in words.split(",") if word]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise ConfigError(
                f"`--columns` ({words}) must be OURS=THEIRS,... Type for example: --columns "
                "prompt=question,chosen=good"
            )
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from rayrm.data.tokenize import prepare_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"`--model` ({options.model}) gives no tokenizer: {str(error).splitlines()[0]} Type a "
            "directory that holds one, or a hub name."
        ) from error
    template = options.chat_template_path
    return prepare_tokenizer(tokenizer, eos_token=None, pad_token=None, chat_template_path=template)


def _progress() -> Callable[[str, int], None]:
    """Rewrites one line of a terminal; elsewhere it adds a line now and then."""
    live, shown = sys.stderr.isatty(), time.monotonic()

    def show(name: str, num_rows: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > (_SHOWN_EVERY_S if live else 20 * _SHOWN_EVERY_S):
            shown = time.monotonic()
            start, end = ("\r", "") if live else ("", "\n")
            print(f"{start}reading {name}: {num_rows:,} rows", end=end, file=sys.stderr, flush=True)

    return show
