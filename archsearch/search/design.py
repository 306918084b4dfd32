"""The first population: genomes that lie far apart and differ as wholes, not only gene by gene."""

from __future__ import annotations

import numpy as np

from archsearch.search.descriptors import Descriptors
from archsearch.search.genes import Codes, Genes
from archsearch.search.surrogate import features

DRAWS = 64
CONCENTRATION = 0.6


def biased(genes: Genes, rng: np.random.Generator, rows: int) -> Codes:
    """Genomes in which genes with the same choices share a taste, (rows, genes).

    Uniform genes average out: a genome of twenty uniform layers is nearly always of middling size.
    Here each genome draws the frequency of the choices first, for each group of alike genes, so
    that small and large, pure and mixed genomes are all common.
    """
    codes = np.empty((rows, len(genes.names)), dtype=np.int64)
    for columns in genes.groups:
        size = int(genes.sizes[columns[0]])
        alpha = CONCENTRATION if len(columns) > 1 else 1e6
        bounds = np.cumsum(rng.dirichlet(np.full(size, alpha), size=rows), axis=1)[:, None, :]
        draws = rng.random((rows, len(columns), 1))
        codes[:, columns] = np.minimum((draws > bounds).sum(axis=2), size - 1)
    return codes


def mixed(genes: Genes, rng: np.random.Generator, rows: int) -> Codes:
    """Uniform and biased genomes with even odds, (rows, genes)."""
    return np.where(rng.random((rows, 1)) < 0.5, genes.random(rng, rows), biased(genes, rng, rows))


def spread(genes: Genes, rng: np.random.Generator, known: Codes, descriptors: Descriptors) -> Codes:
    """Many genomes, the ones farthest from all known ones first by genes and descriptors, (rows, genes)."""
    codes = mixed(genes, rng, DRAWS)
    if len(known) == 0:
        return codes
    here, there = (np.concatenate([features(genes, rows), descriptors(rows)], axis=1) for rows in (codes, known))
    distances = np.linalg.norm(here[:, None] - there[None], axis=2).min(axis=1)
    return codes[np.argsort(-distances, kind="stable")]
