"""Pareto geometry. Every objective is minimised; points are rows of an (n, m) array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


def as_points(points: ArrayLike | Sequence[Sequence[float]]) -> Floats:
    """``points`` as an (n, m) array of finite numbers. Raises ValueError otherwise."""
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, array.shape[-1] if array.ndim == 2 else 1)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError("points must be finite and have the shape (points, objectives)")
    return array


def front(points: ArrayLike) -> Indices:
    """Indices of the non-dominated points in ascending order; equal points are all kept."""
    array = as_points(points)
    if len(array) == 0:
        return np.zeros(0, dtype=np.intp)
    order = np.lexsort(array.T[::-1])
    ordered = array[order]
    # A point can only be dominated by one that comes before it; equal points share the fate of the first of them.
    first = np.ones(len(ordered), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    keep = _sorted_front(ordered[first])[np.cumsum(first) - 1]
    return np.sort(order[keep])


def _sorted_front(unique: Floats) -> NDArray[np.bool_]:
    """Which of the lexicographically sorted, distinct points are non-dominated."""
    keep = np.zeros(len(unique), dtype=bool)
    keep[0] = True
    if unique.shape[1] == 2:
        best = np.minimum.accumulate(unique[:, 1])
        keep[1:] = best[1:] < best[:-1]
    elif unique.shape[1] > 2:
        for index in range(1, len(unique)):
            keep[index] = not (unique[:index][keep[:index]] <= unique[index]).all(axis=1).any()
    return keep


def non_domination_ranks(points: ArrayLike, violations: ArrayLike | None = None) -> Indices:
    """Rank 0 is the front, rank 1 the front without it, and so on (Deb et al. 2002).

    Args:
        points: objectives, (n, m).
        violations: (n,) by how much a point breaks its constraints. Points with a positive one come
            after all others, in the order of their violation.
    """
    array = as_points(points)
    broken = np.zeros(len(array)) if violations is None else np.maximum(np.asarray(violations, dtype=np.float64), 0.0)
    ranks = np.zeros(len(array), dtype=np.intp)
    rest, rank = np.flatnonzero(broken == 0), 0
    while len(rest):
        chosen = front(array[rest])
        ranks[rest[chosen]] = rank
        rest, rank = np.delete(rest, chosen), rank + 1
    worse = np.flatnonzero(broken > 0)
    ranks[worse] = rank + np.unique(broken[worse], return_inverse=True)[1]
    return ranks


def crowding_distances(points: ArrayLike) -> Floats:
    """Crowding distance of each point among all given ones (Deb et al. 2002); the extremes get infinity."""
    array = as_points(points)
    distances = np.zeros(len(array))
    for column in array.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]] if len(order) else 0.0
        if spread == 0:
            continue
        distances[order[[0, -1]]] = np.inf
        distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    return distances


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that ``points`` dominate up to ``reference``; exact for any number of objectives.

    Args:
        points: objectives, (n, m). Points that do not lie below the reference in every objective add nothing.
        reference: (m,).
    """
    corner: Any = np.asarray(reference, dtype=np.float64)
    array = as_points(points)
    if corner.ndim != 1 or (len(array) and corner.shape != array.shape[1:]) or not np.isfinite(corner).all():
        raise ValueError("the reference must be finite and have one number an objective")
    inside = array[(array < corner).all(axis=1)] if len(array) else array
    return _volume(inside[front(inside)], corner) if len(inside) else 0.0


def _volume(points: Floats, reference: Floats) -> float:
    """Slices along the last objective; each slice is a hypervolume with one objective fewer."""
    if points.shape[1] == 1:
        return float(reference[0] - points[:, 0].min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    heights = np.diff(np.append(points[:, -1], reference[-1]))
    if points.shape[1] == 2:
        return float(heights @ (reference[0] - np.minimum.accumulate(points[:, 0])))
    total = 0.0
    for count, height in enumerate(heights, start=1):
        if height > 0:
            flat = points[:count, :-1]
            total += height * _volume(flat[front(flat)], reference[:-1])
    return total
