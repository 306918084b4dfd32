from __future__ import annotations

import numpy as np
import pytest

from archsearch.latency.samples import median_interval, summarize


@pytest.mark.parametrize("count", [6, 11, 60])
def test_interval_of_the_median_covers_it(count: int) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = median_interval(rng.lognormal(0, 1, count))
        assert found is not None
        covered += found[0] <= 1.0 <= found[1]
    assert covered >= 0.95 * 400 - 12


def test_too_few_values_have_no_interval() -> None:
    assert median_interval(np.arange(5.0)) is None
    assert median_interval(np.arange(6.0)) == (0.0, 5.0)


def test_strata_of_different_speed_are_one_sample() -> None:
    found = summarize([np.full(8, 1e-3), np.full(8, 3e-3)], rejected=4)
    assert (found.median, found.lowest) == pytest.approx((2.0, 2.0))
    assert found.interval == pytest.approx((2.0, 2.0))
    assert (found.iqr, found.count, found.rejected) == (0.0, 16, 4)
    assert found.narrow


def test_few_or_scattered_blocks_are_not_narrow() -> None:
    assert not summarize([np.full(8, 1e-3)], 0).narrow
    rng = np.random.default_rng(0)
    assert not summarize([1e-3 * rng.lognormal(0, 0.1, 24)], 0).narrow
    assert summarize([1e-3 * rng.lognormal(0, 0.001, 24)], 0).narrow
