"""What is known of a genome's architecture before it is trained or measured, as numbers for the surrogates.

The genes of a hybrid space act through sums and products of many of them: depth, size, bytes a step, how often each
kind occurs. A surrogate that is told these needs far fewer results than one that must find them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from archsearch.operators import OPERATORS
from archsearch.search.genes import Codes, Floats, Genes
from archsearch.space import SearchSpace

CONTEXT = 4096  # tokens at which the bytes of a step are taken
SAMPLE = 256  # random genomes that give each number its range
REMEMBERED = 20_000  # genomes
RECENT = 8  # arrays: each objective's surrogate asks for the same

Options = tuple[tuple[str, Any], ...]


class Descriptors:
    """Numbers beside the genes, about within [0, 1].

    In any space: how often each choice occurs among genes that are alike (layers, edges, stages). In a space of
    operators also what ``describe`` gives, scaled by its range over the space.

    Args:
        genes: of the space.
        space: of the search, where there is one.
    """

    def __init__(self, genes: Genes, space: object = None) -> None:
        self._genes = genes
        self._groups = [columns for columns in genes.groups if len(columns) > 1]
        # A subclass with genes of its own, such as a table, builds no operators from factors.
        self._space = space if type(space) is SearchSpace else None
        self._rows: dict[tuple[int, ...], list[float]] = {}
        self._recent: dict[bytes, Floats] = {}
        if self._space is not None:
            sample = self._described(genes.random(np.random.default_rng(0), SAMPLE))
            self._low, self._spans = sample.min(axis=0), np.ptp(sample, axis=0)
            self._varied = self._spans > 0  # a space holds but some of the kinds

    def __call__(self, codes: Codes) -> Floats:
        """(rows, genes) to (rows, descriptors)."""
        key = codes.tobytes()
        if key not in self._recent:
            if len(self._recent) >= RECENT:
                self._recent.clear()
            self._recent[key] = self._compute(codes)
        return self._recent[key]

    def _compute(self, codes: Codes) -> Floats:
        parts = [np.zeros((len(codes), 0))]
        for columns in self._groups:
            choices = np.arange(self._genes.sizes[columns[0]])
            parts.append((codes[:, columns, None] == choices).mean(axis=1))
        if self._space is not None:
            scaled = (self._described(codes) - self._low) / np.maximum(self._spans, 1e-12)
            parts.append(scaled[:, self._varied])
        return np.concatenate(parts, axis=1)

    def _described(self, codes: Codes) -> Floats:
        assert self._space is not None
        if len(self._rows) > REMEMBERED:
            self._rows.clear()
        keys = [tuple(row) for row in codes.tolist()]
        for key in keys:
            if key not in self._rows:
                self._rows[key] = describe(self._space, self._genes.decode(key))
        return np.array([self._rows[key] for key in keys])


def describe(space: SearchSpace, genome: Mapping[str, Any]) -> list[float]:
    """Depth, size, bytes a step, share of the FFNs, variety, place of attention, and how often each kind occurs.

    Sizes and counts are logarithms. Limits are not checked.
    """
    chosen = {name: genome.get(name, values[0]) for name, values in space.factors.items()}
    kinds, hidden = space.kinds(chosen), chosen["hidden_size"]
    counts = Counter(kinds)
    costs = {kind: _costs(kind, _options(space, kind, chosen), hidden) for kind in counts}
    size = sum(costs[kind][0] * count for kind, count in counts.items())
    moved = sum(costs[kind][1] * count for kind, count in counts.items())
    ffns = costs["f"][0] * counts["f"] if "f" in costs else 0.0
    attention = [(place + 0.5) / len(kinds) for place, kind in enumerate(kinds) if OPERATORS[kind].full_attention]
    mixers = [kind for kind in kinds if OPERATORS[kind].is_mixer]
    return [
        math.log1p(len(kinds)),
        math.log1p(size),
        math.log(2 * hidden * space.vocab_size + moved),
        ffns / size if size else 0.0,
        float(len(set(mixers))),
        sum(a != b for a, b in pairwise(mixers)) / max(len(mixers), 1),
        sum(attention) / len(attention) if attention else 0.5,
        *(math.log1p(counts[kind]) for kind in OPERATORS),
    ]


def _options(space: SearchSpace, kind: str, chosen: Mapping[str, Any]) -> Options:
    return tuple((name, chosen[f"{kind}.{name}"]) for name in space.options.get(kind, {}))


@lru_cache(maxsize=4096)
def _costs(kind: str, options: Options, hidden: int) -> tuple[float, float]:
    """Parameters of one operator, and the bytes it moves a step; zeros where its options do not fit the width."""
    operator = OPERATORS[kind].model_validate(dict(options))
    try:
        operator.check(hidden)
    except ValueError:
        return 0.0, 0.0
    size = float(operator.parameters(hidden))
    return size, 2 * size + operator.step_bytes(hidden, CONTEXT, 2)
