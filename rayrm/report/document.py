"""What a report says, once; its writers make one HTML file, Markdown and JSON of it.

A report is sections of blocks: sentences, tables, drawings and passages of text. A number is kept as a number
until it is written, and a drawing keeps the numbers that it shows, so that the JSON holds all that the page
shows. Markdown has no pictures: where one stands on the page, its section has a table that says the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrm.errors import writing
from rayrm.report.figures import Picture
from rayrm.report.page import visible, write_page

_LONGEST_TEXT = 4000
_LEAST_P = 1e-4


@dataclass(frozen=True, slots=True)
class Number:
    """A number with the form in which people read it, and its interval where it has one.

    `form`: "count", "percent" (of a share from 0 to 1), "points" (of a difference of two), "signed",
    "seconds", "p" (of a test), or "number".
    """

    value: float | None
    form: str = "number"
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if not _is_known(self.value):
            return "–"
        text = _shown(self.value, self.form)
        if not (_is_known(self.low) and _is_known(self.high)):
            return text
        return f"{text} ({_shown(self.low, self.form).rstrip('%')} to {_shown(self.high, self.form)})"

    @property
    def plain(self) -> Any:
        """As JSON has it: a number, or with an interval `value`, `low`, `high`."""
        if _is_known(self.low) and _is_known(self.high):
            return {"value": plain(self.value), "low": self.low, "high": self.high}
        return plain(self.value)


Cell = str | Number


@dataclass(frozen=True, slots=True)
class Sentence:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """`folded`: the line under which a page hides it until it is clicked; "" shows it."""

    key: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    folded: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Of each column whether its cells are numbers."""
        return [
            bool(self.rows) and all(isinstance(row[i], Number) for row in self.rows) for i in self._places
        ]

    @property
    def _places(self) -> range:
        return range(len(self.columns))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture and the numbers that it shows; where there is nothing to draw, the sentence that says so."""

    key: str
    picture: Picture | None
    absent: str = ""
    numbers: Any = None


@dataclass(frozen=True, slots=True)
class Passage:
    """Texts to read behind one line that says whose they are."""

    line: str
    texts: Sequence[tuple[str, str]]
    numbers: Any = None

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The texts as a page has them: cut where they are very long, and it says so."""
        return [(label, _cut(text)) for label, text in self.texts]


Block = Sentence | Table | Drawing | Passage


@dataclass(frozen=True, slots=True)
class Section:
    """`key`: its name in the JSON. `folded`: a page shows its title alone until it is clicked."""

    key: str
    title: str
    blocks: Sequence[Block]
    folded: bool = False

    @property
    def parts(self) -> list[tuple[str, list[Block]]]:
        """Its blocks; narrow pictures that follow each other are together, for a page to lay side by side."""
        made: list[tuple[str, list[Block]]] = []
        for block in self.blocks:
            kind = "other"
            if isinstance(block, Drawing) and block.picture is not None and not block.picture.wide:
                kind = "pictures"
            if made and made[-1][0] == kind == "pictures":
                made[-1][1].append(block)
            else:
                made.append((kind, [block]))
        return made


@dataclass(frozen=True, slots=True)
class Report:
    """`facts`: what a reader wants first, by name. `warnings`: sentences that a reviewer should not miss."""

    kind: str
    name: str
    subtitle: str
    facts: Sequence[tuple[str, Cell]]
    warnings: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default=())


def write_report(report: Report, page: Path) -> Path:
    """Write `page` (its name ends in .html), and beside it the same name with .md and .json; the page's path.

    Raises RunDirectoryError where the disk takes no file.
    """
    for suffix, text in ((".md", markdown(report)), (".json", as_json(report))):
        file = page.with_suffix(suffix)
        with writing(file):
            file.write_text(text, encoding="utf-8")
    return write_page(
        page,
        "document.html",
        report=report,
        notes=report.notes,
        kind_of=lambda block: type(block).__name__,
    )


def as_json(report: Report) -> str:
    """The report as JSON: facts, warnings, and by section every table, drawing and passage as numbers."""
    sections: dict[str, Any] = {}
    for section in report.sections:
        here: dict[str, Any] = {"title": section.title}
        for block in section.blocks:
            if isinstance(block, Sentence):
                here.setdefault("sentences", []).append(block.text)
            elif isinstance(block, Table):
                here[block.key] = [
                    {column: plain(cell) for column, cell in zip(block.columns, row, strict=True)}
                    for row in block.rows
                ]
            elif isinstance(block, Drawing):
                here[block.key] = plain(block.numbers) if block.picture else {"absent": block.absent}
            else:
                here.setdefault("passages", []).append({**plain(block.numbers), **dict(block.texts)})
        sections[section.key] = here
    content = {
        "kind": report.kind,
        "name": report.name,
        "subtitle": report.subtitle,
        "facts": {name: plain(cell) for name, cell in report.facts},
        "warnings": list(report.warnings),
        "sections": sections,
        "notes": list(report.notes),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode() + "\n"


def markdown(report: Report) -> str:
    """The report as Markdown: no pictures, texts of others fenced so that they change nothing around them."""
    lines = [f"# {_inline(report.name)}", "", _inline(report.subtitle), ""]
    lines += [f"- **{_inline(name)}**: {_inline(str(cell))}" for name, cell in report.facts]
    lines += ["", *(f"> **Warning:** {_inline(text)}\n" for text in report.warnings)]
    for section in report.sections:
        lines += [f"## {_inline(section.title)}", ""]
        for block in section.blocks:
            lines += _markdown_of(block)
    if report.notes:
        lines += ["## Notes on this report", "", *(f"- {_inline(note)}" for note in report.notes), ""]
    return "\n".join(lines)


def _markdown_of(block: Block) -> Iterator[str]:
    if isinstance(block, Sentence):
        yield from (_inline(block.text), "")
    elif isinstance(block, Table):
        if block.title or block.folded:
            yield from (f"**{_inline(block.title or block.folded)}**", "")
        yield _row(block.columns)
        yield "|" + "|".join("---:" if number else "---" for number in block.numeric) + "|"
        yield from (_row([str(cell) for cell in row]) for row in block.rows)
        yield ""
    elif isinstance(block, Drawing):
        if block.picture is None:
            yield from (_inline(block.absent), "")
    else:
        yield from (f"**{_inline(block.line)}**", "")
        for label, text in block.shown:
            longest = max((len(run) for run in re.findall("~+", text)), default=0)
            fence = "~" * max(3, longest + 1)
            yield from (f"{label}:", "", fence, visible(text), fence, "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_inline(cell) for cell in cells) + " |"


def _inline(text: str) -> str:
    """`text` in a line of Markdown: characters that would be markup there are themselves."""
    one_line = " ".join(visible(text).split())
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def plain(value: Any) -> Any:
    """`value` as JSON holds it: arrays as lists, what is not finite as null."""
    if isinstance(value, Number):
        return value.plain
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(value: float | None, form: str) -> str:
    assert value is not None
    if form == "count":
        return f"{value:,.0f}"
    if form == "percent":
        return f"{100 * value:.1f}%"
    if form == "points":
        return f"{100 * value:+.1f}"
    if form == "p":
        return f"{value:.4f}" if value >= _LEAST_P else f"< {_LEAST_P:.4f}"
    if form == "signed":
        return f"{value:+.3f}"
    if form == "seconds":
        return _duration(value)
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cut(text: str) -> str:
    more = len(text) - _LONGEST_TEXT
    return text if more <= 0 else f"{text[:_LONGEST_TEXT]} … ({more} more characters)"
