"""Agreement of two rankings of the same architectures, with bootstrap intervals over the architectures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, spearmanr

from archsearch.schema import Frozen
from archsearch.search.pareto import front, hypervolume

Floats = NDArray[np.float64]
RESAMPLES = 1000
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


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spearmanr(a, b).statistic)


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b; NaN where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(kendalltau(a, b).statistic)


def estimate(
    statistic: Callable[..., float], *columns: Sequence[float], seed: int = 0, count: int | None = None
) -> Estimate | None:
    """A statistic of columns with one row an architecture, and its percentile interval; None where it has none.

    Args:
        statistic: of the columns; NaN where it is not defined.
        columns: of equal length.
        seed: of the resampling.
        count: shown instead of the number of rows.
    """
    table = np.asarray(columns, dtype=np.float64)
    rows = table.shape[1]
    if rows < FEWEST or not np.isfinite(value := statistic(*table)):
        return None
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(*table[:, rng.integers(rows, size=rows)]) for _ in range(RESAMPLES)])
    low, high = np.nanquantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(value=value, low=float(low), high=float(high), count=rows if count is None else count)


def best_third(losses: Sequence[float]) -> NDArray[np.intp]:
    """Rows of the lowest third, rounded up, three at least where there are as many."""
    count = max(-(-len(losses) // 3), min(FEWEST, len(losses)))
    return np.argsort(losses, kind="stable")[:count]


def matched_pairs(latencies: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The quarter of all pairs of rows whose latencies are closest in ratio, as two index arrays."""
    logs = np.log(np.asarray(latencies, dtype=np.float64))
    first, second = np.triu_indices(len(logs), k=1)
    wanted = max(int(np.ceil(NEAR * len(first))), min(1, len(first)))
    nearest = np.argsort(np.abs(logs[first] - logs[second]), kind="stable")[:wanted]
    return first[nearest], second[nearest]


def matched_kendall(a: Floats, b: Floats, latencies: Floats) -> float:
    """Kendall's tau over the pairs of nearly equal latency alone: what ranks when latency cannot.

    Concordant less discordant pairs over both; NaN where every matched pair is a tie.
    """
    first, second = matched_pairs(latencies)
    signs = np.sign(a[first] - a[second]) * np.sign(b[first] - b[second])
    told = np.count_nonzero(signs)
    return float(signs.sum() / told) if told else float("nan")


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
