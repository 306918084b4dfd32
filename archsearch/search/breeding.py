"""Breeding: the settings of ageing evolution, who becomes a parent, and what offspring differ in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from archsearch.config import AgingConfig
from archsearch.search.design import mixed
from archsearch.search.genes import Codes, Floats, Genes
from archsearch.search.history import History
from archsearch.search.pareto import crowding_distances, non_domination_ranks

Lineage = dict[str, Any]
FRESH = 0.1  # share of a pool that has no parent
ONE_MORE = 0.5  # probability that a pool's offspring differs in one more gene
CROWD = 128  # running trials that take a share of the candidates away
FEWEST_CANDIDATES = 32
RECENT = 2000  # mutations that rates are taken from
PRIOR = 4.0  # mutations of a gene that its rate starts from


class AgingSettings(AgingConfig):
    """Settings of the sampler: those of a run, and the paper's latency target."""

    latency_target: float | None = Field(None, gt=0, description="paper: parents should meet it")
    latency_objective: str = Field("decode_latency", description="paper: the objective that the target is for")
    fit_width: str | None = Field(None, description="paper: the gene that is fitted last, the largest in the target")


@dataclass(frozen=True)
class Pool:
    """Offspring, a row each. ``parents`` are rows of the history, -1 for none."""

    codes: Codes
    parents: Codes
    from_front: NDArray[np.bool_]
    crossed: NDArray[np.bool_]


class Breeding:
    """Parents and offspring for one proposal.

    Args:
        genes: of the space.
        history: with at least one finished trial.
        settings: of the sampler.
        rng: the proposal's own generator.
    """

    def __init__(self, genes: Genes, history: History, settings: AgingSettings, rng: np.random.Generator) -> None:
        self._genes, self._history, self._settings, self._rng = genes, history, settings, rng

    @cached_property
    def alive(self) -> NDArray[np.intp]:
        """Rows of the population: the last to be completed."""
        return self._history.finished[-self._settings.population_size :]

    @cached_property
    def _fitness(self) -> tuple[NDArray[np.intp], Floats]:
        values, violations = self._history.values[self.alive], self._history.violations[self.alive]
        return non_domination_ranks(values, violations), crowding_distances(values)

    def tournament(self) -> int:
        """The fittest of some members drawn at random: by rank, then by crowding."""
        ranks, crowding = self._fitness
        entrants = self._entrants()
        return int(self.alive[min(entrants, key=lambda i: (ranks[i], -crowding[i]))])

    def paper_parent(self, violations: Floats) -> int:
        """Argmin of the first objective among some members drawn at random, those within the target first."""
        losses = self._history.values[self.alive, 0]
        broken = violations[self.alive]
        return int(self.alive[min(self._entrants(), key=lambda i: (broken[i], losses[i]))])

    def _entrants(self) -> list[int]:
        size = min(self._settings.tournament_size, len(self.alive))
        return [int(i) for i in self._rng.choice(len(self.alive), size=size, replace=False)]

    def child(self, parent: int, changes: int, frozen: str | None = None) -> Codes:
        """One offspring with ``changes`` mutated genes, the gene ``frozen`` not among them, (genes,)."""
        weights = self.weights * [name != frozen for name in self._genes.names]
        row = self._history.codes[[parent]]
        return np.asarray(self._genes.mutate(self._rng, row, np.array([changes]), weights, near=self._near)[0])

    def offspring(self, changes: int) -> tuple[Codes, Lineage]:
        """One offspring of a member of the front or of a tournament's winner."""
        from_front = bool(self._rng.random() < self._settings.front_parents)
        parent = int(self._rng.choice(self._history.front)) if from_front else self.tournament()
        child = self.child(parent, changes)
        return child, self.lineage(child, parent, from_front)

    def pool(self, importance: Floats) -> Pool:
        """Many different offspring and a few fresh genomes, none of them known.

        Args:
            importance: of each gene for the objectives, (genes,), adding up to 1.
        """
        weights = self.weights / self.weights.sum() + (importance if self._settings.adaptive else 0.0)
        size, rng = self._pool_size, self._rng
        from_front = rng.random(size) < self._settings.front_parents
        parents = np.where(from_front, rng.choice(self._history.front, size), rng.choice(self.alive, size))
        changes = rng.geometric(1 - ONE_MORE, size)
        codes = self._genes.mutate(rng, self._history.codes[parents], changes, weights, near=self._near)
        crossed = rng.random(size) < self._settings.crossover
        mates = self._history.codes[rng.choice(self._history.front, size)]
        codes = np.where(crossed[:, None] & (rng.random(codes.shape) < 0.5), mates, codes)
        fresh = rng.random(size) < FRESH
        codes[fresh], parents[fresh] = mixed(self._genes, rng, int(fresh.sum())), -1
        known = self._history.genomes
        rows = {row: i for i, row in enumerate(map(tuple, codes.tolist())) if row not in known}
        chosen = np.array(list(rows.values()), dtype=np.int64)
        return Pool(codes[chosen], parents[chosen], from_front[chosen], crossed[chosen])

    @property
    def _pool_size(self) -> int:
        """Fewer candidates where many trials run: asks come often then, and what they rest on is old."""
        wanted = self._settings.candidates
        share = 1 + int(self._history.running.sum()) // CROWD
        return min(wanted, max(wanted // share, FEWEST_CANDIDATES))

    def pool_lineage(self, pool: Pool, row: int) -> Lineage:
        """Where a row of a pool came from."""
        lineage = self.lineage(pool.codes[row], int(pool.parents[row]), bool(pool.from_front[row]))
        return lineage | {"kind": "crossover"} if pool.crossed[row] and lineage["genes"] else lineage

    def lineage(self, child: Codes, parent: int, from_front: bool) -> Lineage:
        """What is to be known about an offspring; ``parent`` is a row of the history, -1 for none."""
        if parent < 0:
            return {"kind": "random", "parent": None, "genes": []}
        moved = np.flatnonzero(child != self._history.codes[parent])
        return {
            "kind": "front mutation" if from_front else "mutation",
            "parent": int(self._history.numbers[parent]),
            "genes": [self._genes.names[i] for i in moved],
        }

    @property
    def _near(self) -> bool:
        return self._settings.ordinal and self._settings.mode == "default"

    @cached_property
    def weights(self) -> Floats:
        """Relative mutation rate of each gene, (genes,)."""
        if not self._settings.adaptive or self._settings.mode == "paper":
            return np.ones(len(self._genes.names))
        return mutation_weights(self._history)


def mutation_weights(history: History) -> Floats:
    """How often mutations of each gene have paid, smoothed, (genes,).

    A mutation has paid if the child is on the front now or dominates its parent.

    Args:
        history: with the parents that the driver recorded; without them all rates are equal.
    """
    done = np.zeros(len(history.numbers), dtype=bool)
    done[history.learned] = True
    children = np.flatnonzero(done & (history.parents >= 0))
    children = children[done[history.parents[children]]][-RECENT:]
    parents = history.parents[children]
    dominates = (history.values[children] <= history.values[parents]).all(axis=1)
    dominates &= (history.values[children] < history.values[parents]).any(axis=1)
    paid = np.isin(children, history.front) | dominates
    moved = history.codes[children] != history.codes[parents]
    share = paid.mean() if len(paid) else 0.0
    rate = (moved[paid].sum(axis=0) + PRIOR * share + 1e-3) / (moved.sum(axis=0) + PRIOR)
    return np.asarray(rate / rate.mean() + 0.25)
