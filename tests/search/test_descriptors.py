"""What surrogates are told of an architecture: right, finite, and worth it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from archsearch.architecture import SPACES
from archsearch.config import load_config
from archsearch.errors import InvalidArchitecture
from archsearch.operators import OPERATORS
from archsearch.search.aging import GeneSpace
from archsearch.search.descriptors import CONTEXT, Descriptors, describe
from archsearch.search.genes import Genes
from archsearch.search.surrogate import Surrogate
from benchmarks.formulas import FORMULAS

HYBRID = load_config(SPACES / "hybrid.yaml").space
GENES = Genes.of(HYBRID.genes)


def test_sizes_and_counts_are_those_of_the_architecture() -> None:
    rng, built = np.random.default_rng(0), 0
    while built < 50:
        genome = HYBRID.sample(rng)
        try:
            model = HYBRID.build(genome)
        except InvalidArchitecture:
            continue
        built += 1
        depth, size, moved, ffns, variety, changes, place, *counts = describe(HYBRID, genome)
        kinds = [operator.kind for operator in model.operators]
        assert depth == pytest.approx(math.log1p(len(kinds)))
        # All parameters but the embedding and the gains of the norms.
        gains = (len(kinds) + 1) * model.hidden_size
        assert math.expm1(size) == pytest.approx(model.parameters - HYBRID.vocab_size * model.hidden_size - gains)
        assert math.exp(moved) == pytest.approx(model.step_bytes(CONTEXT) - 2 * gains)
        assert [round(math.expm1(count)) for count in counts] == [kinds.count(kind) for kind in OPERATORS]
        mixers = [kind for kind in kinds if kind != "f"]
        assert variety == len(set(mixers))
        assert changes == pytest.approx(sum(a != b for a, b in itertools.pairwise(mixers)) / len(mixers))
        assert 0 <= ffns < 1
        assert 0 < place < 1


def test_numbers_are_finite_and_about_within_one_for_all_genomes() -> None:
    codes = GENES.random(np.random.default_rng(1), 300)
    points = Descriptors(GENES, HYBRID)(codes)
    assert len(points) == 300
    assert np.isfinite(points).all()
    assert (np.abs(points - 0.5) < 1.5).all()
    assert (Descriptors(GENES, HYBRID)(codes[::-1]) == points[::-1]).all()


def test_alike_genes_are_counted_in_any_space() -> None:
    genes = Genes.of({"layer0": ("a", "b", "c"), "width": (1, 2, 3), "layer1": ("a", "b", "c")})
    space = GeneSpace(dict(zip(genes.names, genes.choices, strict=True)))
    points = Descriptors(genes, space)(np.array([[0, 2, 0], [1, 0, 2]]))
    assert points.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    alone = Genes.of({"layer": ("a", "b", "c"), "width": (1, 2)})
    assert Descriptors(alone, None)(np.array([[0, 1]])).shape == (1, 0)


def test_surrogates_predict_better_with_them() -> None:
    problem, rng = FORMULAS["interplay"], np.random.default_rng(2)
    codes = [row for row in GENES.random(rng, 400) if HYBRID.identity(GENES.decode(row)) is not None][:160]
    values = np.array([problem.objectives(HYBRID.build(GENES.decode(row))) for row in codes])
    known, unknown = np.array(codes[:60]), np.array(codes[60:])
    for objective in (0, 1):
        errors = []
        for space in (None, HYBRID):
            model = Surrogate(GENES, Descriptors(GENES, space))
            model.fit(known, values[:60, objective])
            errors.append(np.abs(model.predict(unknown)[0] - values[60:, objective]).mean())
        assert errors[1] < 0.7 * errors[0]
