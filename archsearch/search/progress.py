"""How a search stands: what is done, the front, its hypervolume. Kept up to date result by result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archsearch.config import SearchConfig
from archsearch.evaluation import Outcome
from archsearch.search.pareto import front, hypervolume

Reason = Literal["finished", "stalled", "exhausted", "interrupted"]
MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a running search.

    ``done`` counts distinct evaluated architectures, ``stopped`` those of them that ended at a rung,
    ``failed`` the others whose objectives do not count. ``best_loss`` is the least first objective.
    ``front_size`` is None where no front is kept. ``seconds_left`` is an estimate from this session's
    pace. ``latest`` and ``outcome`` name the trial whose end is reported, if one is.
    """

    done: int
    total: int
    running: int
    failed: int
    best_loss: float | None
    front_size: int | None
    hypervolume: float | None
    elapsed: float
    seconds_left: float | None
    latest: int | None = None
    outcome: Outcome | None = None
    stopped: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a search ended: why, in a sentence, with which exit code, and where it stands."""

    reason: Reason
    message: str
    exit_code: int
    progress: Progress


def hypervolume_reference(points: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The point up to which dominated volume is counted: the worst of each objective, a tenth worse.

    Args:
        points: objectives of the first population's OK results, (n, m), n at least 1.
    """
    worst = np.asarray(points, dtype=np.float64).max(axis=0)
    margin = np.where(worst == 0, 1.0, MARGIN * np.abs(worst))
    return tuple(float(value) for value in worst + margin)


class Standing:
    """The front and what else is asked of all results, without reading them all again.

    The reference of the hypervolume is fixed once a population of architectures is evaluated, from
    those that are OK by then (or at the first OK one after), and stays for the life of the run.

    Args:
        config: of the search.
        reference: the one fixed earlier in the run.
    """

    def __init__(self, config: SearchConfig, reference: Sequence[float] | None = None) -> None:
        self._population = min(config.aging.population_size, config.evaluations)
        self._epsilon = config.stop_epsilon
        self.reference = tuple(reference) if reference is not None else None
        self.known: dict[str, int] = {}
        self.done = 0
        self.failed = 0
        self.stopped = 0
        self.without_gain = 0
        self.hypervolume: float | None = None
        self.best: float | None = None
        self._front: list[tuple[int, str, tuple[float, ...]]] = []
        self._early: list[tuple[float, ...]] = []
        self._base = 0.0

    @property
    def front_size(self) -> int:
        """Architectures on the front."""
        return len(self._front)

    @property
    def front_ids(self) -> set[str]:
        """Ids of the architectures on the front."""
        return {architecture for _, architecture, _ in self._front}

    def add(
        self, number: int, architecture: str, values: Sequence[float] | None, outcome: Outcome | None = None
    ) -> None:
        """Count one evaluated architecture; ``values`` are its objectives where they count."""
        self.known[architecture] = number
        self.done += 1
        stopped = outcome is Outcome.STOPPED
        self.stopped += stopped
        self.failed += values is None and not stopped
        grew = values is not None and self._enter(number, architecture, tuple(values))
        if self.done >= self._population:
            self._measure(grew)

    def _enter(self, number: int, architecture: str, values: tuple[float, ...]) -> bool:
        """Whether the front changed."""
        self.best = values[0] if self.best is None else min(self.best, values[0])
        if self.reference is None:
            self._early.append(values)
        members = [*self._front, (number, architecture, values)]
        kept = front([member[2] for member in members])
        self._front = [members[index] for index in kept]
        return len(members) - 1 in kept

    def _measure(self, grew: bool) -> None:
        if self.reference is None and self._early:
            self.reference = hypervolume_reference(self._early)
        if self.reference is None:
            return
        if grew or self.hypervolume is None:
            self.hypervolume = hypervolume([values for _, _, values in self._front], self.reference)
        if self.hypervolume > self._base * (1 + self._epsilon):
            self._base, self.without_gain = self.hypervolume, 0
        else:
            self.without_gain += 1
