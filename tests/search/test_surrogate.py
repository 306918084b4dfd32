"""The surrogate: accurate where it must be, honest about the rest, the same whenever it is fitted."""

from __future__ import annotations

import numpy as np
import pytest

from archsearch.search.genes import Codes, Floats, Genes
from archsearch.search.surrogate import SETTLED, Surrogate, SurrogateUnfit, Warp, features, gene_importance

GENES = Genes.of({f"op{i}": ("a", "b", "c") for i in range(8)} | {"width": (64, 128, 256, 512)})


def _truth(codes: Codes) -> Floats:
    worth = np.array([0.0, 0.7, 0.3])
    return 5 - worth[codes[:, :8]].sum(axis=1) * (1 + 0.2 * codes[:, 8]) + 2.0 * (codes[:, 0] == codes[:, 1])


def test_features_keep_order_of_numbers_and_none_of_names() -> None:
    codes = np.zeros((4, 9), dtype=np.int64)
    codes[1, 0], codes[2, 0], codes[3, 8] = 1, 2, 3
    points = features(GENES, codes)
    gaps = np.linalg.norm(points - points[0], axis=1)
    assert gaps[1] == pytest.approx(gaps[2]) == pytest.approx(1.0)
    assert gaps[3] == pytest.approx(1.0)


def test_predicts_additive_and_pairwise_effects_with_uncertainty() -> None:
    rng = np.random.default_rng(0)
    known, new = GENES.random(rng, 150), GENES.random(rng, 200)
    model = Surrogate(GENES)
    model.fit(known, _truth(known))
    mean, std = model.predict(new)
    error = np.abs(mean - _truth(new))
    assert error.mean() < 0.3 * np.abs(_truth(new) - _truth(known).mean()).mean()
    assert np.mean(error < 3 * std) > 0.9
    assert model.predict(known)[1].mean() < std.mean()
    np.testing.assert_allclose(model.expect(new), mean)


def test_a_fresh_model_predicts_the_same_as_one_that_learned_in_steps() -> None:
    rng = np.random.default_rng(1)
    known, new = GENES.random(rng, 60), GENES.random(rng, 20)
    stepwise, fresh = Surrogate(GENES), Surrogate(GENES)
    for rows in range(10, 61, 5):
        stepwise.fit(known[:rows], _truth(known[:rows]))
    fresh.fit(known, _truth(known))
    np.testing.assert_array_equal(stepwise.predict(new), fresh.predict(new))


def test_importance_finds_the_genes_that_matter() -> None:
    codes = GENES.random(np.random.default_rng(2), 200)
    shares = gene_importance(GENES, codes, 3.0 * codes[:, 8] + (codes[:, 2] == 1))
    assert shares.sum() == pytest.approx(1.0)
    assert np.argsort(-shares)[:2].tolist() == [8, 2]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_warp_is_undone(logarithmic: bool) -> None:
    values = np.array([1.0, 2.0, 3.0, 5.0, 90.0])
    warp = Warp(values, logarithmic=logarithmic)
    mean, std = warp.invert(warp.apply(values), np.full(5, 0.1))
    np.testing.assert_allclose(mean, values)
    step = 1e-6
    slopes = (warp.apply(values + step) - warp.apply(values)) / step
    np.testing.assert_allclose(std * slopes, 0.1, rtol=1e-4)
    # Up to the same constant for both warps.
    constant = len(values) * np.log(np.median(values) - values.min())
    assert warp.log_slopes(values) - constant == pytest.approx(np.log(slopes).sum(), rel=1e-4)


def test_sums_stay_as_they_are_and_products_are_taken_apart() -> None:
    codes = GENES.random(np.random.default_rng(4), 60)
    cost = np.array([0.3, 1.0, 2.0])[codes[:, :8]].sum(axis=1)
    for values, logarithmic in ((cost, False), (np.exp(cost), True)):
        model = Surrogate(GENES)
        model.fit(codes, values)
        assert model._warp.logarithmic is logarithmic


@pytest.mark.parametrize("values", [np.ones(30), np.arange(3.0)])
def test_nothing_to_learn_is_said(values: Floats) -> None:
    codes = GENES.random(np.random.default_rng(0), len(values))
    with pytest.raises(SurrogateUnfit):
        Surrogate(GENES).fit(codes, values)


def test_kernels_settle() -> None:
    codes = GENES.random(np.random.default_rng(6), 2 * SETTLED)
    models = [Surrogate(GENES), Surrogate(GENES)]
    for model, rows in zip(models, (SETTLED, 2 * SETTLED), strict=True):
        model.fit(codes[:rows], _truth(codes[:rows]), np.arange(50))
    first, second = (model._process.kernel_.theta for model in models)
    np.testing.assert_array_equal(first, second)
