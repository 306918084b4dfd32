"""Interpolated latencies and the best size within a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archsearch.scaling.choice import LatencyTable, Size, best_by_law, best_measured, latency_budgets
from archsearch.scaling.law import Point, fit_law

DEPTHS, WIDTHS = (2, 4, 8), (128, 256, 512)


def seconds(depth: float, width: float) -> float:
    return 0.1 + depth * (0.01 + width / 10_000)


def loss(depth: float, width: float) -> float:
    return 1.5 + 2.0 * depth**-0.8 + 60.0 * width**-0.9


SIZES = [Size(d, w, seconds(d, w), loss(d, w)) for d in DEPTHS for w in WIDTHS]
LAW = fit_law([Point(d, w, 1, loss(d, w)) for d in DEPTHS for w in WIDTHS], metric="nats")


def test_interpolation_is_exact_for_a_bilinear_latency() -> None:
    table = LatencyTable(SIZES)
    assert table.at([2, 3, 8], [128, 300, 512]) == pytest.approx([seconds(2, 128), seconds(3, 300), seconds(8, 512)])


def test_no_latency_outside_or_beside_a_hole() -> None:
    assert np.isnan(LatencyTable(SIZES).at([1, 9, 4], [128, 128, 1024])).all()
    table = LatencyTable([size for size in SIZES if (size.depth, size.width) != (4, 256)])
    assert np.isnan(table.at([3, 4], [256, 300])).all()
    assert table.at([2, 8], [256, 300]) == pytest.approx([seconds(2, 256), seconds(8, 300)])


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.35, 0.5])
def test_best_by_law_is_the_best_of_all(budget: float) -> None:
    depths, widths = range(2, 9), range(128, 513, 64)
    (choice,) = best_by_law(LAW, SIZES, depths, widths, 1, [budget])
    allowed = [(loss(d, w), d, w) for d in depths for w in widths if seconds(d, w) <= budget]
    assert (choice.size.depth, choice.size.width) == min(allowed)[1:]
    assert choice.size.latency <= budget
    assert choice.loss.value == pytest.approx(min(allowed)[0])
    assert choice.measured is (choice.size.depth in DEPTHS and choice.size.width in WIDTHS)


def test_a_budget_that_nothing_meets_has_no_choice() -> None:
    assert best_by_law(LAW, SIZES, DEPTHS, WIDTHS, 1, [0.01]) == []
    assert best_measured(SIZES, "nats", [0.01]) == []


def test_best_measured() -> None:
    (choice,) = best_measured([*SIZES, Size(6, 128, 0.1, None)], "perplexity", [0.2])
    allowed = [(size.loss, size) for size in SIZES if size.latency <= 0.2]
    best = min(allowed, key=lambda pair: pair[0] or math.inf)
    assert choice.size == best[1]
    assert choice.loss.value == pytest.approx(math.exp(best[0] or 0.0))


def test_budgets_span_what_was_measured() -> None:
    budgets = latency_budgets(SIZES)
    assert budgets[0] == pytest.approx(seconds(2, 128), rel=1e-3)
    assert budgets[-1] == pytest.approx(seconds(8, 512), rel=1e-3)
    assert len(best_by_law(LAW, SIZES, DEPTHS, WIDTHS, 1, budgets)) == len(budgets)
