"""The statistics of a validity study against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from archsearch.validity.agreement import (
    best_third,
    estimate,
    kendall,
    matched_kendall,
    matched_ratio,
    regret,
    spearman,
)

SHORT = [3.0, 2.0, 1.0, 4.0]
LONG = [2.0, 1.5, 1.0, 2.5]


def test_the_same_order_agrees_fully() -> None:
    for statistic in (spearman, kendall):
        found = estimate(statistic, SHORT, LONG)
        assert found is not None
        assert (found.value, found.high, found.count) == (pytest.approx(1), pytest.approx(1), 4)
        assert statistic(SHORT, [-value for value in LONG]) == pytest.approx(-1)


def test_what_has_no_order_has_no_correlation() -> None:
    assert estimate(spearman, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert estimate(spearman, [1.0, 2.0], [1.0, 2.0]) is None


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    whole = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 2400)
    truth, hits = 2 / np.pi * np.arcsin(0.8), 0
    for start in range(0, 60 * 40, 40):
        found = estimate(kendall, *whole[start : start + 40].T.tolist(), seed=start)
        assert found is not None
        hits += found.low < truth < found.high
    assert hits / 60 > 0.85


def test_the_best_third_has_the_lowest_losses() -> None:
    assert best_third([5, 1, 4, 2, 3, 6, 7]).tolist() == [1, 3, 4]
    assert best_third([2, 1]).tolist() == [1, 0]


def test_correlations_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, (2, 30))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)


def test_matched_pairs_are_the_closest_in_ratio() -> None:
    within, pairs = matched_ratio([1.0, 1.1, 10.0, 100.0])
    assert within == pytest.approx(10 / 1.1)
    assert pairs == 2
    assert matched_ratio([2.0, 2.0, 2.0])[1] == 3


def test_latency_alone_gives_no_matched_correlation() -> None:
    rng = np.random.default_rng(0)
    latency = np.exp(rng.normal(0, 1, 300))
    long, short = -np.log(latency) + rng.normal(0, 0.1, 300), -np.log(latency) + rng.normal(0, 0.1, 300)
    matched = matched_kendall(1.1)
    assert kendall(short, long) > 0.85
    assert abs(matched(short, long, latency)) < 0.3
    skill = rng.normal(0, 2, 300)
    assert matched(short + skill, long + skill, latency) > 0.85


def test_regret_of_a_choice() -> None:
    found = regret([1.0, 2.0, 3.0], [2.2, 2.0, 2.6], [3.0, 2.0, 1.0])
    assert found.nats == pytest.approx(0.2)
    assert found.place == 2
    assert found.chance == pytest.approx(0.8 / 3)
    assert found.front == pytest.approx(1.0)
    assert regret([1.0, 2.0], [1.0, 2.0], None).front is None
    assert regret([2.0, 1.0], [1.0, 2.0], [1.0, 1.0]).front < 1
