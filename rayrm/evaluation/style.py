"""The same words in another dress: Markdown taken off a text, or bullets put before the lines of plain lists.

What a reader would read as words and numbers stays, in order; code, in fences or backticks, stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_FENCE = re.compile(r"\s*(```|~~~)")
_CODE = re.compile(r"(`+[^`\n]+`+)")
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_BULLET = re.compile(r"^([ \t]*)[-*+•][ \t]+(?=\S)")
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]")
_TABLE_OR_QUOTE = re.compile(r"^[ \t]*[|>]")
_EMPHASIS = [
    # A mark opens before a character and closes after one; within a word or a product it is a part of it.
    re.compile(r"(?<![\w*])(\*\*\*|\*\*|\*)(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])"),
    re.compile(r"(?<![\w_])(___|__|_)(?=[^\s_])([^_\n]*[^\s_])\1(?![\w_])"),
]


def swap_style(text: str) -> str | None:
    """The text without its Markdown, or where it has none with bullets; None where nothing can be changed."""
    for changed in (without_markdown(text), with_bullets(text)):
        if changed != text:
            return changed
    return None


def without_markdown(text: str) -> str:
    """The text without the marks of headers, bullets and emphasis; numbers of lists are words, and stay."""
    return _outside_fences(text, lambda lines: map(_plain, lines))


def with_bullets(text: str) -> str:
    """The text with "- " before each line of its plain lists: two or more lines that follow each other.

    Lines that are marked already, or indented as code, are in no plain list, nor is a first one with a colon
    at its end.
    """
    return _outside_fences(text, _bulleted)


def _outside_fences(text: str, change: Callable[[list[str]], Iterable[str]]) -> str:
    """Apply `change` to the lines before, between and after blocks of code."""
    done: list[str] = []
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if fence or found:
            done += [*change(lines), line]
            lines = []
        else:
            lines.append(line)
        if found and (not fence or found[1] == fence):
            fence = "" if fence else found[1]
    return "\n".join([*done, *change(lines)])


def _plain(line: str) -> str:
    header = _HEADER.match(line)
    line = header[1] if header else _BULLET.sub(r"\1", line)
    pieces = _CODE.split(line)
    pieces[::2] = map(_without_emphasis, pieces[::2])
    return "".join(pieces)


def _without_emphasis(piece: str) -> str:
    for mark in _EMPHASIS:
        before = ""
        while before != piece:  # emphasis may hold emphasis
            before, piece = piece, mark.sub(r"\2", piece)
    return piece


def _bulleted(lines: list[str]) -> list[str]:
    run: list[str] = []
    done: list[str] = []
    for line in [*lines, ""]:
        if line.strip() and not line.startswith(("    ", "\t")) and not _is_marked(line):
            run.append(line)
            continue
        lead = int(bool(run) and run[0].rstrip().endswith(":"))
        is_list = len(run) - lead > 1
        done += [f"- {each}" if is_list and place >= lead else each for place, each in enumerate(run)]
        run = []
        done.append(line)
    return done[:-1]


def _is_marked(line: str) -> bool:
    return any(mark.match(line) for mark in (_HEADER, _BULLET, _NUMBERED, _TABLE_OR_QUOTE))
