"""Pareto geometry against definitions and an independent count."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.search.acquisition import expected_improvement
from archsearch.search.pareto import crowding_distances, front, hypervolume, non_domination_ranks


def _clouds(objectives: int) -> st.SearchStrategy[list[list[float]]]:
    point = st.lists(st.integers(0, 9).map(float), min_size=objectives, max_size=objectives)
    return st.lists(point, min_size=1, max_size=8)


clouds = st.integers(1, 4).flatmap(_clouds)


def _dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def _inclusion_exclusion(points: np.ndarray, reference: np.ndarray) -> float:
    """The union of boxes, counted by all their intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            sides = np.maximum(reference - np.max(chosen, axis=0), 0)
            total -= (-1) ** size * float(np.prod(sides))
    return total


@given(clouds)
def test_front_is_what_nothing_dominates(cloud: list[list[float]]) -> None:
    points = np.array(cloud)
    expected = [i for i, p in enumerate(points) if not any(_dominates(q, p) for q in points)]
    assert front(points).tolist() == expected


@settings(deadline=None)
@given(clouds)
def test_hypervolume_is_the_union_of_boxes(cloud: list[list[float]]) -> None:
    points = np.array(cloud)
    reference = np.full(points.shape[1], 8.0)
    assert hypervolume(points, reference) == pytest.approx(_inclusion_exclusion(points, reference))


@given(clouds, st.randoms())
def test_hypervolume_ignores_order_and_dominated_points(cloud: list[list[float]], random: object) -> None:
    points = np.array(cloud)
    reference = np.full(points.shape[1], 10.0)
    whole = hypervolume(points, reference)
    shuffled = points.copy()
    random.shuffle(rows := shuffled.tolist())  # type: ignore[attr-defined]
    assert hypervolume(rows, reference) == pytest.approx(whole)
    assert hypervolume(points[front(points)], reference) == pytest.approx(whole)


@given(clouds)
def test_ranks_peel_fronts(cloud: list[list[float]]) -> None:
    points = np.array(cloud)
    ranks = non_domination_ranks(points)
    assert np.flatnonzero(ranks == 0).tolist() == front(points).tolist()
    for i, p in enumerate(points):
        above = [ranks[j] for j, q in enumerate(points) if _dominates(q, p)]
        assert ranks[i] == max(above, default=-1) + 1


def test_feasible_points_come_first_and_violations_in_order() -> None:
    points = [[0.0, 0.0], [5.0, 5.0], [6.0, 6.0], [1.0, 1.0]]
    assert non_domination_ranks(points, [2.0, 0.0, -1.0, 0.5]).tolist() == [3, 0, 1, 2]


def test_crowding_prefers_the_extremes_and_the_lonely() -> None:
    distances = crowding_distances([[0, 10], [1, 9], [2, 8], [6, 4], [10, 0]])
    assert np.isinf(distances[[0, 4]]).all()
    assert distances[3] > distances[2] > distances[1] > 0


def test_empty_and_wrong_input() -> None:
    assert front([]).tolist() == []
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, 0.0]], [1.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="finite"):
        front([[float("nan"), 1.0]])
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[0.0, 0.0]], [1.0])


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_expected_improvement_is_the_mean_gain_of_samples(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    points, reference = rng.random((6, objectives)), np.full(objectives, 1.1)
    mean, std = rng.random((3, objectives)) * 0.6, np.full((3, objectives), 0.2)
    std[0, 0] = 0.0
    before = hypervolume(points, reference)
    gains = expected_improvement(points, reference, mean, std)
    for row in range(3):
        draws = rng.normal(mean[row], std[row], size=(4000, objectives))
        sampled = [hypervolume(np.vstack([points, draw]), reference) - before for draw in draws]
        assert gains[row] == pytest.approx(np.mean(sampled), abs=4 * np.std(sampled) / np.sqrt(4000) + 1e-9)


def test_a_certain_candidate_gains_exactly_its_volume() -> None:
    gains = expected_improvement(np.array([[1.0, 1.0]]), np.array([2.0, 2.0]), np.array([[0.5, 1.5]]), np.zeros((1, 2)))
    assert gains[0] == pytest.approx(0.25)
