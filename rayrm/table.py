"""Tables on a terminal: plain columns, so that the output can be cut, grepped and pasted."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One line for the titles and one for each row; a column is as wide as its widest cell."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
