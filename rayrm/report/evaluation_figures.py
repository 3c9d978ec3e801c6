"""Pictures of an evaluation: scores, margins, calibration, length, groups, and two models' margins.

Each takes arrays and gives a `Picture`, or None where there is nothing to draw. Many points become shaded
cells, so that a picture of a million comparisons is as small as one of a thousand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayrm.metrics.calibration import Bin
from rayrm.report.figures import (
    COLOURS,
    INK,
    MUTED,
    NARROW,
    Picture,
    as_svg,
    canvas,
    histogram,
    name_axis,
)
from rayrm.report.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
MOST_GROUPS = 60
_POINTS = 500
_CELLS = (34, 24)
_LONGEST_NAME = 24
RIGHT, WRONG = COLOURS[0], COLOURS[1]


@dataclass(frozen=True, slots=True)
class GroupAccuracy:
    """A source or subset: its accuracy with its interval, and that of "the longer one wins"."""

    name: str
    accuracy: float
    low: float
    high: float
    baseline: float
    count: int


def rewards(mark: str, won: Array, lost: Array) -> Picture | None:
    """The scores of the chosen and of the rejected sides `[C]`; None where all are equal."""
    scores = np.concatenate([won, lost])
    if not np.isfinite(scores).any() or np.ptp(scores[np.isfinite(scores)]) == 0:
        return None
    return histogram(
        _titled("Scores", mark),
        "score",
        {"rejected": lost, "chosen": won},
        caption="The further apart the better.",
    )


def margins(mark: str, margin: Array) -> Picture | None:
    """How margins `[C]` are spread, the wrong side of zero in its own colour; None where all are equal."""
    margin = margin[np.isfinite(margin)]
    if not len(margin) or np.ptp(margin) == 0:
        return None
    width = float(np.ptp(margin)) / min(40, max(8, int(np.sqrt(len(margin)) * 1.5)))
    # Bins meet at zero, so that none holds comparisons of both kinds.
    first, last = np.floor(margin.min() / width), np.floor(margin.max() / width) + 1
    edges = np.arange(first, last + 1) * width
    shares = np.histogram(margin, edges)[0] / len(margin)
    title = _titled("Margins", mark)
    with canvas(NARROW, 2.7) as figure:
        axis = figure.subplots()
        middles = (edges[:-1] + edges[1:]) / 2
        for side, colour in ((middles < 0, WRONG), (middles > 0, RIGHT)):
            axis.bar(middles[side], shares[side], width, color=colour, alpha=0.55, linewidth=0)
        axis.axvline(0, color=INK, linewidth=1)
        axis.axvline(float(margin.mean()), color=MUTED, linestyle="--", linewidth=1.2)
        axis.set_xlabel("margin: score of chosen minus score of rejected")
        name_axis(axis, "share of comparisons")
        svg = as_svg(figure, title)
    legend = ((0, "right: above zero"), (1, "wrong: zero and below"))
    return Picture(title, svg, "Dashed: the mean.", legend=legend)


def reliability_curve(mark: str, bins: Sequence[Bin], line: str = "") -> Picture | None:
    """How often the model is right at each confidence, over how many comparisons stand there.

    `line`: a sentence of what the curve comes to.
    """
    bins = [one for one in bins if one.count > 0]
    if not bins:
        return None
    confidence, accuracy, count = (
        np.array([getattr(one, key) for one in bins], np.float64)
        for key in ("confidence", "accuracy", "count")
    )
    low = 0.5 if min(one.low for one in bins) >= 0.5 else 0.0
    # Wilson's interval of each share, to tell a bend from a handful of comparisons.
    spread = 1.96**2 / count
    centre = (accuracy + spread / 2) / (1 + spread)
    half = 1.96 / (1 + spread) * np.sqrt(accuracy * (1 - accuracy) / count + 1.96**2 / (4 * count**2))
    title = _titled("Reliability", mark)
    with canvas(NARROW, 3.6) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([low, 1], [low, 1], color=MUTED, linestyle="--", linewidth=1)
        top.vlines(confidence, centre - half, centre + half, color=RIGHT, linewidth=1.4, alpha=0.6)
        top.plot(confidence, accuracy, color=RIGHT, linewidth=1.4, marker="o", markersize=4)
        top.set_xlim(low - 0.02, 1.02)
        _percent(top, "y")
        name_axis(top, "right, of the comparisons there")
        bottom.bar(
            [one.low for one in bins],
            count,
            [one.high - one.low for one in bins],
            align="edge",
            color=MUTED,
            alpha=0.5,
            linewidth=0,
        )
        name_axis(bottom, "comparisons")
        _few_counts(bottom, "y")
        bottom.set_xlabel("confidence: sigmoid of the margin's size")
        _percent(bottom, "x")
        svg = as_svg(figure, title)
    caption = "Dashed: as right as it is confident; below it, overconfident. Bars: 95% intervals."
    return Picture(title, svg, f"{line} {caption}".strip())


def score_by_length(mark: str, length: Array, score: Array) -> Picture | None:
    """Scores `[N]` over lengths `[N]` in tokens, and their line of least squares; None of a constant."""
    finite = np.isfinite(length) & np.isfinite(score)
    length, score = length[finite].astype(np.float64), score[finite]
    if len(score) < 3 or np.ptp(length) == 0 or np.ptp(score) == 0:
        return None
    slope, base = np.polyfit(length, score, 1)
    title = _titled("Score against length", mark)
    with canvas(NARROW, 2.9) as figure:
        axis = figure.subplots()
        _cloud(axis, length, score)
        ends = np.array([length.min(), length.max()])
        axis.plot(ends, base + slope * ends, color=WRONG, linewidth=2)
        axis.set_xlabel("length in tokens, the prompt included")
        name_axis(axis, "score")
        _few_counts(axis, "x")
        svg = as_svg(figure, title)
    per = f"{slope * 100:+.3g} of score for 100 tokens more"
    shade = (
        " The stronger the colour, the more completions." if len(score) > _POINTS else " A dot a completion."
    )
    return Picture(title, svg, f"Orange line, least squares: {per}.{shade}")


def group_bars(mark: str, groups: Sequence[GroupAccuracy]) -> Picture | None:
    """The accuracy of each group with its interval, the best on top; None of fewer than two groups."""
    shown = sorted(groups, key=lambda one: -one.count)[:MOST_GROUPS]
    shown.sort(key=lambda one: (one.accuracy, one.count))
    if len(shown) < 2:
        return None
    title = _titled("Accuracy by group", mark)
    height = 0.95 + 0.21 * len(shown)
    with canvas(NARROW, height) as figure:
        figure.subplots_adjust(left=1.72 / NARROW, right=1 - 0.24 / NARROW)
        axis = figure.subplots()
        places = np.arange(len(shown))
        accuracy, low, high, baseline = (
            np.array([getattr(one, key) for one in shown]) for key in ("accuracy", "low", "high", "baseline")
        )
        axis.barh(places, accuracy, 0.62, color=RIGHT, alpha=0.3, linewidth=0)
        axis.hlines(places, low, high, color=RIGHT, linewidth=1.6)
        axis.scatter(accuracy, places, s=16, color=RIGHT, zorder=3, linewidths=0)
        axis.scatter(baseline, places, s=42, color=WRONG, marker="|", zorder=3, linewidths=1.8)
        axis.axvline(0.5, color=MUTED, linestyle=":", linewidth=1)
        axis.set_yticks(places, [_short(one.name) for one in shown])
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.set_xlim(0, 1)
        axis.grid(visible=False)
        axis.grid(visible=True, axis="x")
        _percent(axis, "x")
        axis.set_xlabel("accuracy")
        svg = as_svg(figure, title)
    left = len(groups) - len(shown)
    more = f" {left} smaller groups are in the table alone." if left else ""
    legend = ((0, "accuracy, its 95% interval"), (1, "the longer one wins"))
    return Picture(title, svg, f"Dotted: chance.{more}", legend=legend)


def agreement(mark: str, name_a: str, name_b: str, margin_a: Array, margin_b: Array) -> Picture | None:
    """The margins `[C]` of two models on the same comparisons; None of fewer than three."""
    if len(margin_a) < 3 or not np.isfinite([margin_a, margin_b]).all():
        return None
    title = _titled(f"Margins of {name_a} and {name_b}", mark)
    with canvas(NARROW, 3.4) as figure:
        axis = figure.subplots()
        _cloud(axis, margin_a, margin_b)
        axis.axhline(0, color=INK, linewidth=1)
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_xlabel(f"margin of {_short(name_a)}")
        name_axis(axis, f"margin of {_short(name_b)}")
        svg = as_svg(figure, title)
    only_a = float(np.mean((margin_a > 0) & (margin_b <= 0)))
    only_b = float(np.mean((margin_b > 0) & (margin_a <= 0)))
    text = (
        f"Top left, {only_b:.1%}: {name_b} alone is right. "
        f"Bottom right, {only_a:.1%}: {name_a} alone is right."
    )
    return Picture(title, svg, text)


def binned(across: Array, up: Array) -> Mapping[str, Any]:
    """The counts of points in the cells of a grid: what `_cloud` shades, as numbers."""
    counts, right, top = np.histogram2d(across, up, bins=_CELLS)
    return {"x_edges": right, "y_edges": top, "counts": counts.astype(np.int64)}


def _cloud(axis: Axes, across: Array, up: Array) -> None:
    """Few points as dots, many as cells that are the darker the more lie there."""
    if len(across) <= _POINTS:
        axis.scatter(across, up, s=9, color=RIGHT, alpha=0.55, linewidths=0)
        return
    from matplotlib.collections import PolyCollection

    cells = binned(across, up)
    counts, right, top = cells["counts"], cells["x_edges"], cells["y_edges"]
    strength = np.sqrt(counts / counts.max())
    levels = np.ceil(strength * 6).astype(np.int64)
    for level in range(1, 7):
        columns, rows = np.nonzero(levels == level)
        corners = [
            np.stack([right[columns + across], top[rows + up]], axis=1)
            for across, up in ((0, 0), (1, 0), (1, 1), (0, 1))
        ]
        cell = PolyCollection(
            list(np.stack(corners, axis=1)), facecolors=RIGHT, alpha=0.1 + 0.14 * level, linewidths=0
        )
        axis.add_collection(cell)
    axis.autoscale_view()


def _percent(axis: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def _few_counts(axis: Axes, which: str) -> None:
    """Few ticks, whole numbers with a comma between thousands."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_locator(MaxNLocator(nbins=6 if which == "x" else 2, integer=True))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _titled(title: str, mark: str) -> str:
    """A picture's title with its set's name: ids are made of titles, and a page may have several sets."""
    return f"{title}: {mark}" if mark else title


def _short(name: str) -> str:
    """A name as an axis has room for it: its beginning and its end."""
    text = visible(name).replace("\n", " ") or "(no name)"
    if len(text) <= _LONGEST_NAME:
        return text
    half = _LONGEST_NAME // 2
    return f"{text[:half]}…{text[1 - half :]}"
