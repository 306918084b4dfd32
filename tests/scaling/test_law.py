"""The law recovers what is known, says how sure it is, and refuses what cannot be known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from archsearch.scaling.held_out import held_out
from archsearch.scaling.law import Law, LawNotIdentified, Metric, Point, as_metric, fit_law
from archsearch.scaling.solver import Problem, solve

DEPTHS, WIDTHS = (6, 12, 18, 24, 30), (512, 768, 1024, 1536, 2048)
PERPLEXITY = {"L0": 10.0, "a": 60.0, "alpha": 1.0, "b": 3000.0, "beta": 0.9}
NATS = {"L0": 1.6, "a": 1.5, "alpha": 0.7, "b": 30.0, "beta": 0.6, "c": 400.0, "gamma": 0.35}


def true_loss(law: dict[str, float], depth: int, width: int, tokens: int = 1) -> float:
    data = law["c"] * tokens ** -law["gamma"] if "c" in law else 0.0
    return law["L0"] + law["a"] * depth ** -law["alpha"] + law["b"] * width ** -law["beta"] + data


def make_points(
    law: dict[str, float],
    *,
    depths: tuple[int, ...] = DEPTHS,
    widths: tuple[int, ...] = WIDTHS,
    budgets: tuple[int, ...] = (10**9,),
    noise: float = 0.0,
    seed: int = 0,
    metric: Metric = "perplexity",
) -> list[Point]:
    rng = np.random.default_rng(seed)
    sizes = [(depth, width, tokens) for depth in depths for width in widths for tokens in budgets]
    losses = [true_loss(law, *size) * math.exp(rng.normal(0.0, noise)) for size in sizes]
    return [
        Point(*size, math.log(loss) if metric == "perplexity" else loss)
        for size, loss in zip(sizes, losses, strict=True)
    ]


def exponents_inside(law: Law, truth: dict[str, float]) -> list[bool]:
    intervals = [(law.interval(name), truth[name]) for name in ("alpha", "beta", "gamma") if name in truth]
    return [interval.low <= value <= interval.high for interval, value in intervals]


def test_exact_points_give_the_exact_law() -> None:
    law = fit_law(make_points(PERPLEXITY))
    assert law.parameters == pytest.approx(PERPLEXITY, rel=1e-3)
    assert law.noise < 1e-5
    assert law.predict([40], [4096]) == pytest.approx([true_loss(PERPLEXITY, 40, 4096)], rel=1e-4)


def test_several_budgets_give_the_data_term() -> None:
    points = make_points(
        NATS, depths=(6, 12, 24), widths=(512, 1024, 2048), budgets=(10**7, 10**8, 10**9), metric="nats"
    )
    law = fit_law(points, metric="nats")
    assert law.parameters == pytest.approx(NATS, rel=1e-2)
    assert law.predict(12, 1024, [10**8, 10**10]) == pytest.approx(
        [true_loss(NATS, 12, 1024, 10**8), true_loss(NATS, 12, 1024, 10**10)], rel=1e-4
    )


@pytest.mark.parametrize(
    ("truth", "grid", "noise", "metric"),
    [
        (PERPLEXITY, {}, 0.005, "perplexity"),
        (NATS, {"depths": (6, 12, 24), "widths": (512, 1024, 2048), "budgets": (10**7, 10**8, 10**9)}, 0.003, "nats"),
    ],
    ids=["depth and width", "and data"],
)
def test_known_exponents_lie_inside_their_intervals(truth, grid, noise, metric) -> None:
    """In 50 synthetic repeats: each exponent, and all at once, in at least 90 %."""
    inside = []
    for repeat in range(50):
        points = make_points(truth, **grid, noise=noise, seed=repeat, metric=metric)
        inside.append(exponents_inside(fit_law(points, metric=metric, repeats=300, seed=repeat), truth))
    assert np.mean(inside, axis=0).min() >= 0.9
    assert np.mean(np.all(inside, axis=1)) >= 0.9


def test_intervals_shrink_with_the_noise() -> None:
    widths = []
    for noise in (0.001, 0.004):
        interval = fit_law(make_points(PERPLEXITY, noise=noise)).interval("alpha")
        widths.append(interval.high - interval.low)
    assert widths[0] < 0.5 * widths[1]


def test_one_bad_training_hardly_moves_the_law() -> None:
    points = make_points(PERPLEXITY, noise=0.002)
    points[7] = replace(points[7], loss=points[7].loss + 0.5)
    law = fit_law(points)
    assert law.parameters["alpha"] == pytest.approx(1.0, abs=0.1)
    assert law.predict(40, 4096)[0] == pytest.approx(true_loss(PERPLEXITY, 40, 4096), rel=0.02)
    assert np.argmax(np.abs(law.residuals)) == 7


def test_new_models_fall_inside_the_prediction_interval() -> None:
    inside = 0
    for seed in range(40):
        law = fit_law(make_points(PERPLEXITY, noise=0.01, seed=seed), repeats=300, seed=seed)
        noise = math.exp(np.random.default_rng([9, seed]).normal(0.0, 0.01))
        interval = law.predict_interval(36, 2560)
        assert interval.low < interval.value < interval.high
        inside += interval.low <= true_loss(PERPLEXITY, 36, 2560) * noise <= interval.high
    assert inside >= 36


def test_same_seed_same_intervals() -> None:
    points = make_points(PERPLEXITY, noise=0.01)
    assert fit_law(points, seed=3).summary() == fit_law(points, seed=3).summary()
    assert fit_law(points, seed=3).summary() != fit_law(points, seed=4).summary()


def test_held_out_error_is_that_of_larger_models_only() -> None:
    found = held_out(make_points(PERPLEXITY, noise=0.003))
    assert found.scheme == "largest depth and width"
    assert (found.fitted, len(found.predictions)) == (16, 9)
    assert all(p.point.depth == 30 or p.point.width == 2048 for p in found.predictions)
    assert found.mean_error <= found.worst_error < 0.053
    # A larger model that behaves otherwise must show.
    points = [
        replace(point, loss=point.loss + 0.2) if point.depth == 30 else point
        for point in make_points(PERPLEXITY, noise=0.003)
    ]
    assert held_out(points).worst_error > 0.1


def test_a_small_grid_holds_out_its_corner() -> None:
    found = held_out(make_points(PERPLEXITY, depths=(4, 8, 16), widths=(512, 1024, 2048), noise=0.002))
    assert found.scheme == "corner"
    assert [(p.point.depth, p.point.width) for p in found.predictions] == [(16, 2048)]


@pytest.mark.parametrize(
    ("points", "cause"),
    [
        (make_points(PERPLEXITY, depths=(6,)), "1 value(s) of depth"),
        (make_points(PERPLEXITY, widths=(512, 1024)), "2 value(s) of width"),
        (make_points(NATS, budgets=(10**8, 10**9)), "2 value(s) of tokens"),
        (make_points(PERPLEXITY, depths=(6, 12, 18), widths=(512, 768, 1024))[:5], "value(s) of depth"),
        ([Point(d, w, 1, 3.0 + 1 / d) for d, w in [(2, 64), (4, 96), (8, 128), (16, 96), (4, 64)]], "5 points for 5"),
        ([*make_points(PERPLEXITY), Point(36, 512, 10**9, math.nan)], "depth 36, width 512"),
        ([*make_points(PERPLEXITY), Point(36, 512, 10**9, math.inf)], "loss at depth 36"),
        ([*make_points(PERPLEXITY), Point(36, 512, 10**9, 5000.0)], "loss at depth 36"),
        ([Point(d, w, 1, 3.0) for d in DEPTHS for w in WIDTHS], "the same everywhere"),
        ([], "value(s) of depth"),
    ],
)
def test_what_cannot_be_fitted_is_refused(points: list[Point], cause: str) -> None:
    with pytest.raises(LawNotIdentified) as caught:
        fit_law(points)
    assert cause in caught.value.cause
    assert caught.value.remedy


def test_nothing_can_be_held_out_of_what_cannot_be_fitted() -> None:
    with pytest.raises(LawNotIdentified, match="value"):
        held_out([])
    with pytest.raises(LawNotIdentified, match="no model has depth 16 and width 2048"):
        held_out(make_points(PERPLEXITY, depths=(4, 8, 16), widths=(512, 1024, 2048))[:-1])


def test_a_loss_that_ignores_width_leaves_its_exponent_open() -> None:
    law = fit_law(make_points({**PERPLEXITY, "b": 0.0}, noise=0.003))
    interval = law.interval("beta")
    assert interval.high / interval.low > 10
    assert law.undetermined == ["beta"]
    assert law.interval("alpha").low <= 1.0 <= law.interval("alpha").high


def test_the_jacobian_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(rng.normal(size=(7, 2)), rng.normal(size=7))
    theta = rng.normal(scale=0.5, size=(1, 5))
    for index in range(5):
        step = np.zeros((1, 5))
        step[0, index] = 1e-6
        slope = (problem.predict(theta + step) - problem.predict(theta - step)) / 2e-6
        assert slope[0] == pytest.approx(problem.jacobian(theta)[0, :, index], abs=1e-8)


def test_rows_are_solved_as_if_alone() -> None:
    points = make_points(PERPLEXITY, noise=0.01)
    inputs = np.log([[p.depth / 15, p.width / 1000] for p in points])
    targets = np.log(as_metric([p.loss for p in points], "perplexity")) + np.array([[0.0], [0.1], [-0.1]])
    problem = Problem(inputs, targets[0])
    together, losses = solve(inputs, targets, problem.starts(targets), 0.01)
    for row in range(3):
        alone, loss = solve(inputs, targets[row : row + 1], problem.starts(targets[row : row + 1]), 0.01)
        assert alone[0] == pytest.approx(together[row], abs=1e-6)
        assert loss[0] == pytest.approx(losses[row])
