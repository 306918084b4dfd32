"""Genomes as arrays: each gene a column, each choice its index. What designs and mutations work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Choice = bool | int | float | str | None
Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

NEIGHBOUR = 0.75  # share of an ordinal gene's mutations that go to an adjacent choice


def is_ordinal(choices: Sequence[Choice]) -> bool:
    """Whether the choices are numbers in strictly ascending or descending order."""
    if len(choices) < 3 or not all(type(choice) in (int, float) for choice in choices):
        return False
    steps = np.diff(np.asarray(choices, dtype=np.float64))
    return bool((steps > 0).all() or (steps < 0).all())


@dataclass(frozen=True)
class Genes:
    """Names and choices of the genes of a space."""

    names: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]

    @classmethod
    def of(cls, choices: Mapping[str, Sequence[Choice]]) -> Genes:
        """From a mapping of gene to choices."""
        return cls(tuple(choices), tuple(tuple(values) for values in choices.values()))

    @cached_property
    def sizes(self) -> Codes:
        """Number of choices a gene, (genes,)."""
        return np.array([len(values) for values in self.choices], dtype=np.int64)

    @cached_property
    def ordinal(self) -> NDArray[np.bool_]:
        """Which genes are ordered numbers, (genes,)."""
        return np.array([is_ordinal(values) for values in self.choices], dtype=bool)

    @cached_property
    def count(self) -> int:
        """Number of genomes."""
        return int(np.prod([float(size) for size in self.sizes])) if len(self.names) else 1

    @cached_property
    def groups(self) -> tuple[NDArray[np.intp], ...]:
        """Columns of genes with identical choices: layers, edges or stages that are alike."""
        alike: dict[Any, list[int]] = {}
        for index, values in enumerate(self.choices):
            alike.setdefault(tuple((type(v), v) for v in values), []).append(index)
        return tuple(np.array(columns, dtype=np.intp) for columns in alike.values())

    @cached_property
    def _index(self) -> tuple[dict[Any, int], ...]:
        return tuple({(type(v), v): i for i, v in enumerate(values)} for values in self.choices)

    def encode(self, genome: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Choice indices, or None where a gene is missing or holds no choice of this space."""
        try:
            values = [genome[name] for name in self.names]
            return tuple([index[type(v), v] for index, v in zip(self._index, values, strict=True)])
        except (KeyError, TypeError):
            return None

    def decode(self, codes: Sequence[int] | Codes) -> dict[str, Any]:
        """The genome of choice indices."""
        return {name: values[int(i)] for name, values, i in zip(self.names, self.choices, codes, strict=True)}

    def random(self, rng: np.random.Generator, rows: int) -> Codes:
        """Uniform genomes, (rows, genes)."""
        return rng.integers(self.sizes, size=(rows, len(self.names)))

    def mutate(
        self, rng: np.random.Generator, parents: Codes, changes: Codes, weights: Floats, *, near: bool = True
    ) -> Codes:
        """Each parent with ``changes`` of its genes moved to another choice.

        Args:
            rng: source of randomness.
            parents: (rows, genes).
            changes: (rows,) number of genes to change.
            weights: (genes,) relative probability of each gene.
            near: ordinal genes move to a neighbour more often than far.
        """
        free = self.sizes > 1
        keys = np.where(free, np.log(np.maximum(weights, 1e-12)), -np.inf) + rng.gumbel(size=parents.shape)
        order = np.argsort(np.argsort(-keys, axis=1), axis=1)
        moved = (order < np.minimum(changes, free.sum())[:, None]) & free
        far = (parents + 1 + rng.integers(np.maximum(self.sizes - 1, 1), size=parents.shape)) % self.sizes
        return np.where(moved, self._near(rng, parents, far) if near else far, parents)

    def _near(self, rng: np.random.Generator, parents: Codes, far: Codes) -> Codes:
        """``far`` with most of the ordinal genes replaced by a neighbour of the parent's choice."""
        step = parents + np.where(rng.random(parents.shape) < 0.5, -1, 1)
        step = np.where(step < 0, 1, np.where(step >= self.sizes, self.sizes - 2, step))
        return np.where(self.ordinal & (rng.random(parents.shape) < NEIGHBOUR), step, far)
