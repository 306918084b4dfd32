"""The best depth and width for each latency: predicted loss joined with measured decode latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from archsearch.scaling.law import Estimate, Law, Metric, as_metric

Floats = NDArray[np.float64]
BUDGETS = 8


@dataclass(frozen=True, slots=True)
class Size:
    """A depth and width with its decode latency in seconds; ``loss`` in nats, where it was trained."""

    depth: int
    width: int
    latency: float
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The size with the lowest loss within a latency budget.

    Attributes:
        budget: seconds.
        size: what to build.
        loss: in the law's metric, with its interval where the law predicted it.
        measured: whether this very size was timed; otherwise its latency is interpolated.
    """

    budget: float
    size: Size
    loss: Estimate
    measured: bool


class LatencyTable:
    """Measured latencies of a grid, linear in depth and width between its points.

    A step costs a constant and a part that grows with depth, and with width no faster than its
    square, so a straight line between neighbours errs on the slow side.

    Args:
        sizes: measured points. Where the grid has a hole, what lies around it has no latency.
    """

    def __init__(self, sizes: Sequence[Size]) -> None:
        self._depths = sorted({size.depth for size in sizes})
        self._widths = sorted({size.width for size in sizes})
        self._table = np.full((len(self._depths), len(self._widths)), np.nan)
        for size in sizes:
            self._table[self._depths.index(size.depth), self._widths.index(size.width)] = size.latency

    def at(self, depth: ArrayLike, width: ArrayLike) -> Floats:
        """Seconds at depths and widths (broadcast together); NaN outside the measured range."""
        row, down = _place(self._depths, np.asarray(depth, dtype=np.float64))
        column, right = _place(self._widths, np.asarray(width, dtype=np.float64))
        total = np.zeros(np.broadcast(row, column).shape)
        for i, vertical in ((0, 1 - down), (1, down)):
            for j, horizontal in ((0, 1 - right), (1, right)):
                corner = self._table[
                    np.minimum(row + i, len(self._depths) - 1), np.minimum(column + j, len(self._widths) - 1)
                ]
                weight = vertical * horizontal
                # A corner without weight may be a hole or lie outside.
                total = total + np.where(weight == 0, 0.0, corner * weight)
        return total


def _place(values: Sequence[int], wanted: Floats) -> tuple[NDArray[np.intp], Floats]:
    """(index of the value at or below, fraction of the way to the next); the fraction is NaN outside."""
    axis = np.asarray(values, dtype=np.float64)
    index = np.clip(np.searchsorted(axis, wanted, side="right") - 1, 0, len(axis) - 1)
    above = np.minimum(index + 1, len(axis) - 1)
    span = np.where(above > index, axis[above] - axis[index], 1.0)
    fraction = (wanted - axis[index]) / span
    return index, np.where((wanted >= axis[0]) & (wanted <= axis[-1]), fraction, np.nan)


def latency_budgets(sizes: Sequence[Size]) -> list[float]:
    """Budgets from the fastest to the slowest measured size, evenly spaced in their logarithm."""
    latencies = [size.latency for size in sizes]
    return [float(f"{value:.4g}") for value in np.geomspace(min(latencies), max(latencies), BUDGETS)]


def best_by_law(
    law: Law, sizes: Sequence[Size], depths: Sequence[int], widths: Sequence[int], tokens: int, budgets: Sequence[float]
) -> list[Choice]:
    """For each budget the depth and width with the lowest predicted loss; budgets that nothing meets are left out.

    Args:
        law: predicts the loss.
        sizes: measured latencies.
        depths: to choose from.
        widths: to choose from.
        tokens: the training budget that the loss is predicted for.
        budgets: seconds.
    """
    depth, width = (array.ravel() for array in np.meshgrid(depths, widths, indexing="ij"))
    latency = LatencyTable(sizes).at(depth, width)
    losses = law.predict(depth, width, tokens)
    timed = {(size.depth, size.width) for size in sizes}
    choices = []
    for budget in budgets:
        # Rounded budgets must still admit the size that they were taken from.
        allowed = np.where(latency <= budget * 1.001, losses, np.inf)
        best = int(np.argmin(allowed))
        if np.isfinite(allowed[best]):
            size = Size(int(depth[best]), int(width[best]), float(latency[best]))
            estimate = law.predict_interval(size.depth, size.width, tokens)
            choices.append(Choice(budget, size, estimate, (size.depth, size.width) in timed))
    return choices


def best_measured(sizes: Sequence[Size], metric: Metric, budgets: Sequence[float]) -> list[Choice]:
    """The same among the trained sizes only, by their measured loss, for where there is no law."""
    choices = []
    for budget in budgets:
        allowed = [(size.loss, size) for size in sizes if size.loss is not None and size.latency <= budget * 1.001]
        if allowed:
            nats, size = min(allowed, key=lambda pair: pair[0])
            loss = float(as_metric(nats, metric))
            choices.append(Choice(budget, size, Estimate(loss, loss, loss), True))
    return choices
