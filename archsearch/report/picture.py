"""The picture of a run: its front, what the front dominates, and the known seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, FAINT, GRID = "#1c2733", "#66727f", "#b8c1ca", "#e8ecf0"
FRONT, SEED = "#0b6e99", "#d9822b"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
Box = tuple[float, float, float, float]
WIDE_RANGE = 8.0
"""An axis whose values span more than this factor is logarithmic."""


@dataclass(frozen=True, slots=True)
class Point:
    """One finished candidate: its trial number and its place in the picture."""

    number: int
    x: float
    y: float
    on_front: bool
    seed: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture shows; ``x_label`` and ``y_label`` name quantity and unit."""

    points: Sequence[Point]
    title: str
    subtitle: str
    x_label: str
    y_label: str


def draw(picture: Picture, path: Path) -> None:
    """Write a PNG of 1440 by 900 pixels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.625), dpi=160, facecolor="white")
        axes = figure.add_axes((0.085, 0.115, 0.885, 0.735))
        _frame(axes, picture)
        _points(axes, picture.points)
        figure.text(0.085, 0.945, picture.title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.085, 0.895, picture.subtitle, fontsize=9.5, color=MUTED, va="center")
        figure.savefig(path, format="png", metadata={"Software": "archsearch"})


def _frame(axes: Axes, picture: Picture) -> None:
    axes.set_xlabel(picture.x_label, labelpad=7)
    axes.set_ylabel(picture.y_label, labelpad=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    xs, ys = [p.x for p in picture.points], [p.y for p in picture.points]
    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        axis.set_major_locator(MaxNLocator(6))
        if values and min(values) > 0 and max(values) / min(values) > WIDE_RANGE:
            axis._set_axes_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())


def _points(axes: Axes, points: Sequence[Point]) -> None:
    front = sorted((p for p in points if p.on_front), key=lambda p: (p.x, p.y))
    others = [p for p in points if not p.on_front]
    seeds = [p for p in points if p.seed]
    axes.margins(x=0.06, y=0.10)
    axes.scatter([p.x for p in others], [p.y for p in others], s=30, color=FAINT, lw=0, label="dominated", zorder=3)
    if front:
        xs, ys = [p.x for p in front], [p.y for p in front]
        axes.plot(xs, ys, color=FRONT, lw=1.8, drawstyle="steps-post", alpha=0.55, zorder=4)
        axes.scatter(xs, ys, s=58, color=FRONT, edgecolor="white", lw=1.2, label="Pareto front", zorder=6)
    if seeds:
        xs, ys = [p.x for p in seeds], [p.y for p in seeds]
        axes.scatter(xs, ys, s=170, facecolor="none", edgecolor=SEED, lw=1.8, label="known seed", zorder=7)
    if points:
        axes.figure.legend(
            *axes.get_legend_handles_labels(),
            loc="center right",
            bbox_to_anchor=(0.975, 0.945),
            ncols=3,
            frameon=False,
            labelcolor=MUTED,
            fontsize=9.5,
            handletextpad=0.3,
            columnspacing=1.4,
            borderpad=0,
        )
    else:
        axes.text(0.5, 0.5, "no candidate finished", transform=axes.transAxes, ha="center", color=MUTED)
    _label(axes, [*front, *(p for p in seeds if not p.on_front)], points)


def _label(axes: Axes, labelled: Sequence[Point], points: Sequence[Point]) -> None:
    """Trial numbers beside their points: at the first corner where nothing else is, with a white edge."""
    axes.autoscale_view()
    scale = 72 / axes.figure.dpi
    place = {p.number: axes.transData.transform((p.x, p.y)) * scale for p in points}
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in place.values()]
    for point in labelled:
        x, y = place[point.number]
        width = 6.5 * len(str(point.number))
        boxes = [(left, low, left + width, low + 9) for left, low in _corners(x, y, width)]
        box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        axes.annotate(
            str(point.number),
            (point.x, point.y),
            xytext=(box[0] - x, box[1] - y),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if point.on_front else "normal",
            color=FRONT if point.on_front else SEED,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
            zorder=8,
        )


def _corners(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Lower left corners of a label around a point: upper right first, then the others, then farther away."""
    near = [(x + 6, y + 5), (x - 6 - width, y - 13), (x - 6 - width, y + 5), (x + 6, y - 13)]
    return [*near, (x + 6, y + 15), (x - 6 - width, y - 23)]


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
