"""The picture of a scaling study: loss against decode latency, a line a depth, the best size of each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Line:
    """The models of one depth, by width: seconds, measured losses, and the law's where there is one."""

    label: str
    latencies: Sequence[float]
    measured: Sequence[float]
    fitted: Sequence[float]


@dataclass(frozen=True, slots=True)
class ScalingPicture:
    """What the picture shows; ``best`` holds (seconds, loss, name of the size)."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    best: Sequence[tuple[float, float, str]]


def draw_scaling(picture: ScalingPicture, path: Path) -> None:
    """Write a PNG of 1440 by 900 pixels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from archsearch.report.picture import MUTED, STYLE

    style: Any = STYLE
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 5.625), dpi=160, facecolor="white")
        axes = figure.add_axes((0.1, 0.115, 0.87, 0.735))
        _lines(axes, picture)
        _best(axes, picture)
        _frame(axes, picture)
        figure.text(0.1, 0.945, picture.title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.1, 0.895, picture.subtitle, fontsize=9.5, color=MUTED, va="center")
        figure.savefig(path, format="png", metadata={"Software": "archsearch"})


def _lines(axes: Axes, picture: ScalingPicture) -> None:
    import matplotlib as mpl

    colors = mpl.colormaps["viridis"]
    for index, line in enumerate(picture.lines):
        color = colors(0.85 * (1 - index / max(len(picture.lines) - 1, 1)))
        timed = line.latencies[: len(line.measured)]
        axes.scatter(timed, line.measured, s=34, color=color, edgecolor="white", lw=0.8, label=line.label, zorder=4)
        if line.fitted:
            axes.plot(line.latencies, line.fitted, color=color, lw=1.3, alpha=0.8, zorder=3)


def _best(axes: Axes, picture: ScalingPicture) -> None:
    from archsearch.report.picture import SEED

    if not picture.best:
        return
    xs, ys = [x for x, _, _ in picture.best], [y for _, y, _ in picture.best]
    axes.scatter(xs, ys, s=130, lw=1.8, facecolor="none", edgecolor=SEED, label="best within a budget", zorder=5)
    for index, (x, y, name) in enumerate(dict.fromkeys(picture.best)):
        # Above and below in turn: neighbours on the flat end lie close together.
        offset = (0, -19 if index % 2 else 12)
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha="center", fontsize=8.5, color=SEED, zorder=6)


def _frame(axes: Axes, picture: ScalingPicture) -> None:
    from archsearch.report.picture import GRID, MUTED, WIDE_RANGE

    axes.set_xlabel(picture.x_label, labelpad=7)
    axes.set_ylabel(picture.y_label, labelpad=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=GRID, lw=0.8)
    axes.margins(x=0.1, y=0.12)
    latencies = [latency for line in picture.lines for latency in line.latencies]
    if not latencies:
        axes.text(0.5, 0.5, "no model was timed", transform=axes.transAxes, ha="center", color=MUTED)
        return
    if max(latencies) / min(latencies) > WIDE_RANGE:
        _logarithmic(axes)
    axes.legend(frameon=False, labelcolor=MUTED, fontsize=9.5)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis of times with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
