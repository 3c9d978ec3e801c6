"""Pictures of a run as SVG text for a page: axes, curves, histograms, pairs, shares. matplotlib, loaded late.

A colour is one of the page's: each is drawn as `var(--c0, #...)` and the like (page.html defines them for
light and for dark), text stays text in the page's font, and the same numbers give the same bytes.
Curves of many values are thin lines under their running mean, of a few hundred points; what has nothing
finite to show is None instead of a picture.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayrm.report.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

INK, MUTED, GRID = "#1f2328", "#5d6673", "#dde1e6"
COLOURS = ("#0b5fd0", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#946000", "#475569")
"""Blue, orange, green, violet, pink, cyan, ochre, slate."""
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
NARROW, WIDE = 4.6, 6.6
_MOST_POINTS = 400
SMOOTHED_FROM = 40


@dataclass(frozen=True, slots=True)
class Picture:
    """`svg` is a whole `<svg>` element; `wide` ones want the page's width.

    `legend`: numbers of the page's colours and what they stand for, where the page tells them.
    """

    title: str
    svg: str
    caption: str = ""
    wide: bool = False
    legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """Values `[n]` over steps `[n]`; NaN: not logged there. `band` `[n]`: how far around them is tinted."""

    label: str
    steps: Array
    values: Array
    band: Array | None = None
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One axis of a picture whose panels share their steps. `since`: from this step on it is shaded."""

    unit: str
    curves: Sequence[Curve]
    since: float | None = None


def curves(
    title: str,
    unit: str,
    drawn: Sequence[Curve],
    *,
    rolls: Sequence[float] = (),
    caption: str = "",
    named: bool = True,
) -> Picture | None:
    """Curves over steps on one axis; dotted verticals at `rolls`. `named`: as of `panels`."""
    return panels(title, [Panel(unit, drawn)], rolls=rolls, caption=caption, named=named)


def hacking_picture(
    series: Mapping[str, tuple[str, Array]],
    steps: Array,
    since: Mapping[str, float],
    *,
    title: str = "Reward against its checks",
    rolls: Sequence[float] = (),
) -> Picture | None:
    """The reward over its checks, on one axis of steps: the reward should not rise while a check goes wrong.

    Args:
        series: name -> (unit, values `[n]`); the first is the reward, then gold, spread, length, KL, ... .
        steps: `[n]`.
        since: name -> the step from which on its panel is shaded.
    """
    rows = [
        Panel(
            f"{name} ({unit})" if unit else name, [Curve(name, steps, values, colour=i % 8)], since.get(name)
        )
        for i, (name, (unit, values)) in enumerate(series.items())
    ]
    shaded = "Shaded: since when a warning holds." if since else ""
    return panels(title, rows, rolls=rolls, caption=shaded, wide=True)


def panels(
    title: str,
    rows: Sequence[Panel],
    *,
    rolls: Sequence[float] = (),
    caption: str = "",
    wide: bool = False,
    named: bool = True,
) -> Picture | None:
    """Axes one above the other that share their steps; those with nothing finite are left out.

    `named`: curves are told apart by a legend in the picture, and not by the page's.
    """
    rows = [row for row in rows if any(np.isfinite(curve.values).any() for curve in row.curves)]
    if not rows:
        return None
    height = 2.5 if len(rows) == 1 else 0.8 + 1.15 * len(rows)
    with canvas(WIDE if wide else NARROW, height) as figure:
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for axis, row in zip(axes, rows, strict=True):
            for curve in row.curves:
                _draw(axis, curve)
            name_axis(axis, row.unit)
            _short_ticks(axis)
            if not any(curve.values[np.isfinite(curve.values)].any() for curve in row.curves):
                axis.set_ylim(-0.05, 1.0)  # all zero: nothing is below
            if row.since is not None:
                end = max(float(curve.steps[-1]) for curve in row.curves)
                axis.axvspan(row.since, max(end, row.since), color=COLOURS[1], alpha=0.14, linewidth=0)
            for step in rolls:
                axis.axvline(step, color=MUTED, linestyle=":", linewidth=1)
            if named and len(row.curves) > 1:
                _legend(axis, len(row.curves))
        axes[-1].set_xlabel("step")
        _whole_steps(axes[-1])
        svg = as_svg(figure, title)
    return Picture(title, svg, caption, wide)


def histogram(title: str, unit: str, groups: Mapping[str, Array], *, caption: str = "") -> Picture | None:
    """How the values of each group are spread, over the same bins, as shares of their group."""
    kept = {label: values[np.isfinite(values)] for label, values in groups.items()}
    if not any(len(values) for values in kept.values()):
        return None
    pooled = np.concatenate(list(kept.values()))
    low, high = float(pooled.min()), float(pooled.max())
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(40, max(8, int(np.sqrt(len(pooled)) * 1.5))) + 1)
    with canvas(NARROW, 2.7) as figure:
        axis = figure.subplots()
        for place, (label, values) in enumerate(kept.items()):
            if not len(values):
                continue
            colour = COLOURS[1 - place] if place < 2 else COLOURS[place % 8]
            shares = np.histogram(values, edges)[0] / len(values)
            axis.stairs(shares, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
            axis.stairs(shares, edges, color=colour, linewidth=1.6, label=visible(label))
            axis.axvline(float(values.mean()), color=colour, linestyle="--", linewidth=1.2)
        axis.set_xlabel(visible(unit))
        name_axis(axis, "share of completions")
        axis.set_ylim(bottom=0)
        _legend(axis, len(kept))
        svg = as_svg(figure, title)
    return Picture(title, svg, f"Dashed: the means. {caption}".strip())


def paired_dots(
    title: str,
    unit: str,
    before: Array,
    after: Array,
    *,
    caption: str = "",
) -> Picture | None:
    """One line for each pair `[P]`, from `before` to `after`, in the order of their differences."""
    if not len(before) or not np.isfinite(np.concatenate([before, after])).all():
        return None
    order = np.argsort(after - before, kind="stable")
    first, second = before[order], after[order]
    places = np.arange(1, len(order) + 1)
    size = float(np.clip(900 / len(order), 4, 26))
    with canvas(NARROW, 2.7) as figure:
        axis = figure.subplots()
        up = second >= first
        for sign, colour in ((up, COLOURS[0]), (~up, COLOURS[1])):
            axis.vlines(places[sign], first[sign], second[sign], color=colour, alpha=0.6, linewidth=1.2)
        axis.scatter(places, first, s=size, facecolors="none", edgecolors=MUTED, linewidths=1, label="before")
        axis.scatter(places, second, s=size, color=COLOURS[0], linewidths=0, label="after")
        axis.set_xlabel("prompts, by gain")
        name_axis(axis, unit)
        _whole_steps(axis)
        _legend(axis, 2)
        svg = as_svg(figure, title)
    return Picture(title, svg, f"Orange lines: prompts that lost. {caption}".strip())


def shares(
    title: str, steps: Array, of: Mapping[str, Array], *, rolls: Sequence[float] = (), caption: str = ""
) -> Picture | None:
    """Which part `[n]` of each step was given by whom, as a strip of stacked bars; dotted at `rolls`."""
    if not of or not len(steps):
        return None
    parts_KN = np.nan_to_num(np.stack(list(of.values())))
    left, right = _spans(steps)
    with canvas(WIDE, 1.35) as figure:
        axis = figure.subplots()
        bottom = np.zeros(len(steps))
        for place, part in enumerate(parts_KN):
            for begin, end, height, base in _runs(left, right, part, bottom):
                axis.bar(
                    begin,
                    height,
                    end - begin,
                    base,
                    align="edge",
                    color=COLOURS[place % 8],
                    alpha=0.8,
                    linewidth=0,
                )
            bottom += part
        for step in rolls:
            axis.axvline(step, color=INK, linestyle=":", linewidth=1.2)
        axis.set_xlim(float(left[0]), float(right[-1]))
        axis.set_ylim(0, 1)
        axis.set_yticks([0, 1], ["0%", "100%"])
        axis.grid(visible=False)
        name_axis(axis, "share of the step's scores")
        axis.set_xlabel("step")
        _whole_steps(axis)
        svg = as_svg(figure, title)
    return Picture(title, svg, caption, wide=True)


def _spans(steps: Array) -> tuple[Array, Array]:
    """Where each step's bar begins and ends: halfway to its neighbours."""
    gaps = np.diff(steps) / 2
    edge = gaps if len(gaps) else np.array([0.5])
    return steps - np.concatenate([edge[:1], gaps]), steps + np.concatenate([gaps, edge[-1:]])


def _runs(
    left: Array, right: Array, part: Array, bottom: Array
) -> Iterator[tuple[float, float, float, float]]:
    """Equal neighbours as one bar: a run with two versions is a few bars, not thousands."""
    changes = np.flatnonzero((np.diff(part) != 0) | (np.diff(bottom) != 0)) + 1
    for first, last in zip([0, *changes], [*changes, len(part)], strict=True):
        if part[first] > 0:
            yield float(left[first]), float(right[last - 1]), float(part[first]), float(bottom[first])


def _draw(axis: Axes, curve: Curve) -> None:
    """Few values with a mark each; many as a thin line under their running mean."""
    finite = np.isfinite(curve.values)
    band = curve.band if curve.band is not None else np.full(len(curve.values), np.nan)
    steps, values, band = (_thin(part[finite]) for part in (curve.steps, curve.values, band))
    if not len(values):
        return
    colour, label = COLOURS[curve.colour], visible(curve.label)
    look: dict[str, Any] = {"color": colour, "linestyle": "--" if curve.dashed else "-"}
    if np.isfinite(band).any():
        axis.fill_between(steps, values - band, values + band, color=colour, alpha=0.13, linewidth=0)
    if len(values) < SMOOTHED_FROM:
        axis.plot(steps, values, linewidth=1.6, marker="o", markersize=3, label=label, **look)
        return
    axis.plot(steps, values, linewidth=0.8, alpha=0.4, **look)
    smooth = _running_mean(values, 2 * max(2, len(values) // 30) + 1)
    axis.plot(steps, smooth, linewidth=2, label=label, **look)


def _running_mean(values: Array, width: int) -> Array:
    """The mean over `width` neighbours, fewer at the ends."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _thin(values: Array) -> Array:
    """At most `_MOST_POINTS`: means of equal stretches, the last of which may be shorter."""
    size = -(-len(values) // _MOST_POINTS)
    if size <= 1:
        return values
    starts = np.arange(0, len(values), size)
    thinned: Array = np.add.reduceat(values, starts) / np.diff([*starts, len(values)])
    return thinned


def name_axis(axis: Axes, unit: str) -> None:
    """What the vertical axis counts stands over it: to be read without turning one's head."""
    axis.set_title(visible(unit), loc="left", fontsize=9, color=MUTED, pad=5)


def _short_ticks(axis: Axes) -> None:
    """Very small and very large numbers as they are typed (2e-6): there is room for six characters."""
    from matplotlib.ticker import FuncFormatter

    low, high = axis.get_ylim()
    if not 1e-3 <= max(abs(low), abs(high)) < 1e5:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _typed(value)))


def _typed(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _legend(axis: Axes, num: int) -> None:
    """To the right above the axis, where nothing is drawn."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.01, 0.97), ncols=num, borderaxespad=0, handlelength=1.4)


def _whole_steps(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rayrm",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.columnspacing": 1.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, in our style whatever the user's is; nothing of pyplot's is touched."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Layout measures in DejaVu; a glyph that it lacks is the reader's font's to show.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height))
        # Inches, the same in all pictures: axes stand under each other, and nothing need be drawn twice.
        left, right, top, bottom = 0.62, 0.12, 0.3, 0.5
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=0.5)
        yield figure


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page: the page's colours and font, ids that are its own, no metadata."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.set_canvas(FigureCanvasSVG(figure))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    mark = re.sub(r"\W+", "-", title.lower()).strip("-")
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{mark}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font-size: \1", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height|xmlns:xlink|version)="[^"]*"', "", head)
    named = f'role="img" aria-labelledby="{mark}-title"><title id="{mark}-title">{_escaped(title)}</title>'
    return f"{head} {named}{rest}"


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(visible(text)))
