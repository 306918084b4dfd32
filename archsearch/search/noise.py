"""Seed noise: how far the same architecture's proxy loss moves with nothing but the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from archsearch.schema import Frozen

LEVEL = 0.95


class SeedNoise(Frozen):
    """Standard deviation of the loss between seeds, with its 95 % interval, in nats a token.

    ``freedom`` are the degrees of freedom behind it: of each architecture its trainings less one.
    """

    std: float
    low: float
    high: float
    freedom: int
    source: str = ""

    def difference(self, first: int = 1, second: int = 1) -> float:
        """The difference that two mean losses must pass to be told apart at 95 %, two-sided.

        Student's quantile times the deviation times sqrt(1 / first + 1 / second).

        Args:
            first: trainings behind the one mean.
            second: behind the other.
        """
        from scipy.stats import t

        return float(t.ppf(0.5 + LEVEL / 2, self.freedom)) * self.std * math.sqrt(1 / first + 1 / second)

    def tells(self, lower: Sequence[float], higher: Sequence[float]) -> bool:
        """Whether the mean of one candidate's losses is lower than another's by more than the noise explains."""
        return fmean(higher) - fmean(lower) >= self.difference(len(lower), len(higher))


def ties(losses: Mapping[int, Sequence[float]], noise: SeedNoise) -> dict[int, list[int]]:
    """Which neighbours in the order of the mean loss the noise cannot tell apart; those alone are left out.

    Args:
        losses: trial number to the losses of its trainings.
        noise: of one training.
    """
    ranked = sorted((number for number in losses if losses[number]), key=lambda number: (fmean(losses[number]), number))
    found: dict[int, list[int]] = {}
    for a, b in pairwise(ranked):
        if not noise.tells(losses[a], losses[b]):
            found.setdefault(a, []).append(b)
            found.setdefault(b, []).append(a)
    return found


def pooled_noise(groups: Iterable[Sequence[float]], source: str = "") -> SeedNoise | None:
    """The deviation within groups of losses, pooled; None where no group has two.

    Args:
        groups: losses of one architecture each, from different seeds.
        source: said where the noise is shown.
    """
    from scipy.stats import chi2

    squares, freedom = 0.0, 0
    for losses in groups:
        if len(losses) < 2:
            continue
        mean = sum(losses) / len(losses)
        squares += sum((loss - mean) ** 2 for loss in losses)
        freedom += len(losses) - 1
    if not freedom:
        return None
    low, high = (math.sqrt(squares / float(chi2.ppf(p, freedom))) for p in (0.5 + LEVEL / 2, 0.5 - LEVEL / 2))
    return SeedNoise(std=math.sqrt(squares / freedom), low=low, high=high, freedom=freedom, source=source)
