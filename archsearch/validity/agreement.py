"""Agreement of two rankings of the same architectures, with bootstrap intervals over the architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from archsearch.schema import Frozen
from archsearch.search.pareto import front, hypervolume

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
"""Of arrays with an architecture a place on the last axis, a number for each place on the others."""
RESAMPLES = 1000
MOST_PAIRS = 2**22
"""Pairs in memory at once while resampling."""
LEVEL = 0.95
FEWEST = 3
"""Architectures below which a correlation is not computed."""
NEAR = 0.25
"""Share of all pairs, those closest in latency, that count as matched."""


class Estimate(Frozen):
    """A statistic with the bounds of its bootstrap interval; ``count`` architectures (or pairs) carry it."""

    value: float
    low: float
    high: float
    count: int


def spearman(a: ArrayLike, b: ArrayLike) -> Floats:
    """Spearman's rank correlation along the last axis; NaN where one side is constant."""
    x, y = (rankdata(side, axis=-1) for side in (a, b))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))


def kendall(a: ArrayLike, b: ArrayLike) -> Floats:
    """Kendall's tau-b along the last axis; NaN where one side is constant."""
    x, y = (_signs(side) for side in (a, b))
    with np.errstate(invalid="ignore"):
        told = np.sqrt(np.count_nonzero(x, axis=-1) * np.count_nonzero(y, axis=-1))
        return np.asarray((x * y).sum(axis=-1) / told)


def _signs(values: ArrayLike) -> NDArray[np.int8]:
    """The sign of the difference of every pair, (..., pairs)."""
    array = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(array.shape[-1], k=1)
    return np.sign(array[..., first] - array[..., second]).astype(np.int8)


def matched_kendall(within: float) -> Statistic:
    """Kendall's tau over the pairs whose latencies differ by a factor of ``within`` at most.

    What is left to rank where latency cannot: concordant less discordant pairs, over both. The statistic takes
    short losses, long losses and latencies; it is NaN where every matched pair is a tie.
    """

    def statistic(a: ArrayLike, b: ArrayLike, latencies: ArrayLike) -> Floats:
        logs = np.log(np.asarray(latencies, dtype=np.float64))
        first, second = np.triu_indices(logs.shape[-1], k=1)
        near = np.abs(logs[..., first] - logs[..., second]) <= np.log(within)
        signs = _signs(a) * _signs(b) * near
        with np.errstate(invalid="ignore"):
            return np.asarray(signs.sum(axis=-1, dtype=np.int64) / np.count_nonzero(signs, axis=-1))

    return statistic


def matched_ratio(latencies: ArrayLike) -> tuple[float, int]:
    """(factor within which the closest quarter of all pairs of latencies lie, how many these are)."""
    logs = np.log(np.asarray(latencies, dtype=np.float64))
    first, second = np.triu_indices(len(logs), k=1)
    distances = np.sort(np.abs(logs[first] - logs[second]))
    # A hair more, so that rounding does not lose the pair that sets the factor.
    within = float(np.exp(distances[max(int(np.ceil(NEAR * len(distances))), 1) - 1] * (1 + 1e-9) + 1e-12))
    return within, int(np.count_nonzero(distances <= np.log(within)))


def estimate(
    statistic: Statistic, *columns: Sequence[float], seed: int = 0, count: int | None = None
) -> Estimate | None:
    """A statistic of columns with one row an architecture, and its percentile interval; None where it has none.

    Args:
        statistic: of the columns, along their last axis; NaN where it is not defined.
        columns: of equal length.
        seed: of the resampling.
        count: shown instead of the number of rows.
    """
    table = np.asarray(columns, dtype=np.float64)
    rows = table.shape[1]
    if rows < FEWEST or not np.isfinite(value := float(statistic(*table))):
        return None
    chosen = np.random.default_rng(seed).integers(rows, size=(RESAMPLES, rows))
    parts = np.array_split(chosen, max(1, RESAMPLES * rows**2 // MOST_PAIRS))
    draws = np.concatenate([statistic(*(column[part] for column in table)) for part in parts])
    low, high = np.nanquantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(value=value, low=float(low), high=float(high), count=rows if count is None else count)


def best_third(losses: Sequence[float]) -> NDArray[np.intp]:
    """Rows of the lowest third, rounded up, three at least where there are as many."""
    count = max(-(-len(losses) // 3), min(FEWEST, len(losses)))
    return np.argsort(losses, kind="stable")[:count]


class Regret(Frozen):
    """What choosing by the proxy loses.

    Attributes:
        nats: long loss of the proxy's choice above the best long loss.
        place: rank of the proxy's choice among the long losses, from 1.
        chance: mean regret of a choice at random, in nats.
        front: dominated volume of (long loss, latency) that the proxy's front keeps of the whole, 1 at best;
            None without latencies.
    """

    nats: float
    place: int
    chance: float
    front: float | None


def regret(short: Sequence[float], long: Sequence[float], latencies: Sequence[float] | None) -> Regret:
    """The regret of choosing among architectures by their short loss."""
    chosen = int(np.argmin(short))
    best = min(long)
    kept = None
    if latencies is not None:
        points = np.column_stack([long, latencies])
        corner = points.max(axis=0) + 0.1 * np.abs(points.max(axis=0))
        picked = points[front(np.column_stack([short, latencies]))]
        kept = hypervolume(picked, corner) / hypervolume(points, corner)
    place = 1 + sum(value < long[chosen] for value in long)
    return Regret(nats=long[chosen] - best, place=place, chance=float(np.mean(long)) - best, front=kept)
