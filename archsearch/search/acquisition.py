"""Expected hypervolume improvement: what an evaluation is worth before it is paid for."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from archsearch.search.genes import Floats
from archsearch.search.pareto import crowding_distances, front

WIDEST_FRONT = 64  # points kept of a front with three objectives or more; cells grow with its square


def expected_improvement(points: Floats, reference: Floats, mean: Floats, std: Floats) -> Floats:
    """Expected gain in hypervolume of each candidate, in closed form, for independent normal objectives.

    The space that no point dominates is cut into cells by the coordinates of the front in all
    objectives but the last; the gain in a cell is a product of one-dimensional integrals. With
    one objective this is the usual expected improvement.

    Args:
        points: known objectives, (n, m), all minimised.
        reference: (m,).
        mean: predicted objectives of the candidates, (c, m).
        std: their standard deviations, (c, m); 0 where an objective is known.

    Returns:
        (c,) expected gains.
    """
    edges, tops = _cells(_useful(points, reference), reference)
    gain = _integral(tops[None], mean[:, -1], std[:, -1])
    for objective in reversed(range(len(edges))):
        below = _integral(edges[objective][None], mean[:, objective], std[:, objective])
        strips = np.diff(below, axis=1, prepend=0.0)
        gain = (gain * strips.reshape(len(mean), *[1] * objective, -1)).sum(axis=-1)
    return gain


def _useful(points: Floats, reference: Floats) -> Floats:
    inside = points[(points < reference).all(axis=1)]
    members = np.unique(inside[front(inside)], axis=0)
    if len(reference) > 2 and len(members) > WIDEST_FRONT:
        members = members[np.argsort(-crowding_distances(members), kind="stable")[:WIDEST_FRONT]]
    return members


def _cells(members: Floats, reference: Floats) -> tuple[list[Floats], Floats]:
    """Upper edges of the strips in each objective but the last, and how high each cell is free in the last."""
    columns = [np.unique(members[:, k]) for k in range(len(reference) - 1)]
    tops = np.full([len(column) + 1 for column in columns], reference[-1])
    for member in members:
        cell = tuple(int(np.searchsorted(column, x)) + 1 for column, x in zip(columns, member[:-1], strict=True))
        tops[cell] = min(tops[cell], member[-1])
    for axis in range(tops.ndim):
        tops = np.minimum.accumulate(tops, axis=axis)
    return [np.append(column, reference[k]) for k, column in enumerate(columns)], tops


def _integral(edges: Floats, mean: Floats, std: Floats) -> Floats:
    """Expected length between a normal variable and each edge above it; candidates come first."""
    shape = (len(mean), *[1] * (edges.ndim - 1))
    center, width = mean.reshape(shape), np.maximum(std, 1e-12).reshape(shape)
    z = (edges - center) / width
    return np.asarray(width * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)))
