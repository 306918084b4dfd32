"""The picture of a validity study: long against short losses, and what each budget's ranking is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class ValidityPicture:
    """What the picture shows.

    ``short``, ``long`` (nats a token) and ``latency`` (seconds) have one entry an architecture; ``budgets`` are
    (training, tokens, Spearman, its interval's ends); ``noise`` is the deviation of a short loss between seeds.
    """

    title: str
    subtitle: str
    short: Sequence[float]
    long: Sequence[float]
    latency: Sequence[float]
    noise: float | None
    budgets: Sequence[tuple[str, int, float, float, float]]
    wanted: float
    short_tokens: int
    long_tokens: int


def draw_validity(picture: ValidityPicture, path: Path) -> None:
    """Write a PNG of 1600 by 720 pixels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from archsearch.report.picture import MUTED, STYLE

    style: Any = STYLE
    with mpl.rc_context(style):
        figure = Figure(figsize=(11.4, 5.2), dpi=140, facecolor="white")
        left, right = figure.add_axes((0.065, 0.13, 0.4, 0.68)), figure.add_axes((0.575, 0.13, 0.4, 0.68))
        _losses(figure, left, picture)
        _budgets(right, picture)
        figure.text(0.065, 0.94, picture.title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.065, 0.875, picture.subtitle, fontsize=9.5, color=MUTED, va="center")
        figure.savefig(path, format="png", metadata={"Software": "archsearch"})


def _losses(figure: Any, axes: Axes, picture: ValidityPicture) -> None:
    from archsearch.report.picture import FAINT, GRID

    axes.set_xlabel(f"loss after {picture.short_tokens:,} tokens [nats a token]")
    axes.set_ylabel(f"loss after {picture.long_tokens:,} tokens [nats a token]")
    axes.grid(True, color=GRID, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if not picture.short:
        return
    if picture.noise is not None:
        axes.errorbar(picture.short, picture.long, xerr=picture.noise, fmt="none", ecolor=FAINT, lw=1.2, zorder=2)
    points = axes.scatter(
        picture.short, picture.long, c=picture.latency, s=46, cmap="viridis", edgecolor="white", lw=0.8, zorder=3
    )
    bar = figure.colorbar(points, ax=axes, pad=0.02)
    bar.set_label("decode latency [s]")
    bar.outline.set_visible(False)


def _budgets(axes: Axes, picture: ValidityPicture) -> None:
    from matplotlib.ticker import NullFormatter

    from archsearch.report.picture import FRONT, GRID, MUTED, SEED

    labels = {"long": "on the way of the long training", "short": "the short training, and on its way"}
    for name, color in (("long", FRONT), ("short", SEED)):
        points = sorted(point[1:] for point in picture.budgets if point[0] == name)
        if not points:
            continue
        tokens, values, lows, highs = zip(*points, strict=True)
        axes.fill_between(tokens, lows, highs, color=color, alpha=0.12, lw=0)
        axes.plot(tokens, values, "o-", color=color, lw=1.6, ms=5, label=labels[name])
    axes.axhline(picture.wanted, color=MUTED, lw=1, ls=":")
    ticks = sorted({point[1] for point in picture.budgets if point[0] == "long"})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [_short(tokens) for tokens in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"Spearman with the loss after {picture.long_tokens:,} tokens")
    axes.set_ylim(top=1.03)
    axes.grid(True, color=GRID, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if picture.budgets:
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _short(tokens: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)
