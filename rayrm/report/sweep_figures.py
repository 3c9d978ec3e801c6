"""Pictures of a sweep: its trials by all parameters at once, by each of them, and over their steps.

An axis is a parameter's values: even, by the logarithm where positive numbers span a factor of ten or more,
or one place for each where they are no numbers. The best trial is orange, those that were stopped are grey
and dashed (or hollow), the others blue, and in the first picture the fainter the worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrm.report.figures import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    NARROW,
    WIDE,
    Picture,
    as_svg,
    canvas,
    name_axis,
)
from rayrm.report.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 10.0
_FEW = 6
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True)
class Point:
    """One trial: its parameters' values as typed, its metric, and its curve of (percent, value)."""

    name: str
    values: tuple[str, ...]
    metric: float
    stopped: bool = False
    best: bool = False
    curve: Sequence[tuple[float, float]] = ()

    @property
    def look(self) -> dict[str, Any]:
        if self.best:
            return {"color": COLOURS[1], "linestyle": "-", "zorder": 4}
        return {"color": MUTED if self.stopped else COLOURS[0], "linestyle": "--" if self.stopped else "-"}


@dataclass(frozen=True, slots=True)
class Scale:
    """Where the values of a parameter lie: `place` of a word; `marks` (place, label) are the axis's ticks."""

    log: bool
    words: tuple[str, ...] | None
    """The values in order where they are no numbers."""

    @classmethod
    def of(cls, words: Sequence[str]) -> Scale:
        numbers = [_number(word) for word in words]
        if any(number is None for number in numbers):
            return cls(False, tuple(dict.fromkeys(words)))
        found = [number for number in numbers if number is not None]
        return cls(min(found) > 0 and max(found) / min(found) >= _LOG_FROM, None)

    def number(self, word: str) -> float:
        if self.words is not None:
            return float(self.words.index(word))
        return float(_number(word) or 0.0)

    def place(self, word: str) -> float:
        number = self.number(word)
        return math.log10(number) if self.log else number


def parallel_coordinates(keys: Sequence[str], metric: str, points: Sequence[Point]) -> Picture | None:
    """A line for each trial through its place on every parameter's axis, and on the metric's at the right."""
    if not points or len(keys) < 2:
        return None
    columns = [[point.values[place] for point in points] for place in range(len(keys))]
    scales = [Scale.of(column) for column in columns]
    places_AP = [
        np.array([scale.place(word) for word in column])
        for scale, column in zip(scales, columns, strict=True)
    ]
    places_AP.append(np.array([point.metric for point in points]))
    spans = [(float(places.min()), float(places.max())) for places in places_AP]
    heights_AP = np.stack([_between(places, *span) for places, span in zip(places_AP, spans, strict=True)])
    worst_first = sorted(range(len(points)), key=lambda place: points[place].best)
    strength = _between(places_AP[-1], *spans[-1])
    if any(point.best for point in points) and _best_is_lowest(points):
        strength = 1.0 - strength
    with canvas(WIDE, 3.2) as figure:
        axis = figure.subplots()
        across = np.arange(len(heights_AP))
        for place in worst_first:
            point = points[place]
            alpha = 1.0 if point.best else 0.25 + 0.6 * float(strength[place])
            width = 2.6 if point.best else 1.4
            axis.plot(across, heights_AP[:, place], linewidth=width, alpha=alpha, **point.look)
        places = zip([*scales, Scale(False, None)], [*columns, []], spans, strict=True)
        for position, (scale, column, span) in enumerate(places):
            axis.axvline(position, color=MUTED, linewidth=1, zorder=0)
            for height, label in _marks(scale, column, span):
                axis.annotate(
                    visible(label),
                    (position, height),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=INK,
                    bbox={"boxstyle": "round,pad=0.1", "facecolor": GRID, "alpha": 0.75, "linewidth": 0},
                    zorder=5,
                )
        axis.set_xticks(across, [visible(key) for key in (*keys, metric)])
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False)
        axis.set_xlim(-0.15, len(across) - 0.65)
        axis.set_ylim(-0.06, 1.06)
        svg = as_svg(figure, "All parameters")
    faint = "Orange: the best trial; the fainter, the worse."
    return Picture("All parameters", svg, f"{faint}{_stopped(points, 'dashed')}", wide=True)


def by_parameter(key: str, place: int, metric: str, points: Sequence[Point]) -> Picture | None:
    """The metric of every trial over one of its parameters."""
    words = [point.values[place] for point in points]
    if len(set(words)) < 2:
        return None
    scale = Scale.of(words)
    with canvas(NARROW, 2.7) as figure:
        axis = figure.subplots()
        for point, word in zip(points, words, strict=True):
            look = point.look
            axis.scatter(
                [scale.number(word)],
                [point.metric],
                s=46 if point.best else 30,
                facecolors="none" if point.stopped else look["color"],
                edgecolors=look["color"],
                linewidths=1.2,
                zorder=4 if point.best else 3,
            )
        if scale.words is not None:
            axis.set_xticks(range(len(scale.words)), [visible(word) for word in scale.words])
            axis.set_xlim(-0.5, len(scale.words) - 0.5)
        if scale.log:
            _log_axis(axis)
        axis.set_xlabel(visible(key))
        name_axis(axis, metric)
        svg = as_svg(figure, key)
    return Picture(key, svg, ("Logarithmic axis." if scale.log else "") + _stopped(points, "hollow"))


def over_steps(metric: str, points: Sequence[Point]) -> Picture | None:
    """The metric of every trial at its evaluations, over the percentage of its steps."""
    drawn = [point for point in points if len(point.curve) > 1]
    if not drawn:
        return None
    with canvas(WIDE, 2.7) as figure:
        axis = figure.subplots()
        for point in sorted(drawn, key=lambda point: point.best):
            percent, values = zip(*point.curve, strict=True)
            width = 2.4 if point.best else 1.3
            alpha = 1.0 if point.best else 0.55
            axis.plot(percent, values, linewidth=width, marker="o", markersize=2.5, alpha=alpha, **point.look)
            if not point.best and len(drawn) > _MOST_NAMED:
                continue  # numbers would lie on each other
            axis.annotate(
                visible(point.name.removeprefix("trial-")),
                (percent[-1], values[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=MUTED,
            )
        axis.set_xlim(0, 105)
        axis.set_xlabel("percent of a trial's steps")
        name_axis(axis, metric)
        svg = as_svg(figure, "Over the steps")
    numbered = f"Orange: {next((point.name for point in drawn if point.best), 'none')}, the best."
    return Picture("Over the steps", svg, f"{numbered}{_stopped(points, 'dashed')}", wide=True)


def _between(places: Any, low: float, high: float) -> Any:
    """Places as heights from 0 to 1; in the middle where all are one."""
    return (places - low) / (high - low) if high > low else np.full(len(places), 0.5)


def _best_is_lowest(points: Sequence[Point]) -> bool:
    ended = [point.metric for point in points if not point.stopped]
    return next(point.metric for point in points if point.best) == min(ended) != max(ended)


def _marks(scale: Scale, column: Sequence[str], span: tuple[float, float]) -> list[tuple[float, str]]:
    """Heights and labels of an axis's ticks: each value where they are few, else five numbers."""
    low, high = span
    words = sorted(set(column), key=scale.place)
    if words and (scale.words is not None or len(words) <= _FEW):
        heights = _between(np.array([scale.place(word) for word in words]), low, high)
        return list(zip(heights.tolist(), words, strict=True))
    places = np.linspace(low, high, 5)
    labels = [f"{10**place if scale.log else place:.3g}" for place in places]
    return list(zip(_between(places, low, high).tolist(), labels, strict=True))[: 1 if high <= low else 5]


def _log_axis(axis: Axes) -> None:
    """Powers of ten as numbers that are typed (1e-05), and at least two of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    few = math.log10(high / low) < 2.5
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0) if few else (1.0,), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _stopped(points: Sequence[Point], how: str) -> str:
    return f" Grey, {how}: stopped early." if any(point.stopped for point in points) else ""
