"""The scaling law of depth, width and data: L(D, W, N) = L0 + a D^-alpha + b W^-beta + c N^-gamma.

Nemotron-Flash (arXiv 2511.18890), Eq. 1. The N term takes part where several budgets were run. The fit
is robust (Huber's loss on the logarithm of the loss, that is on its relative error), starts from a grid
of exponents, and is done in logarithms of all parameters, so that none can become negative.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from archsearch.errors import ConfigError
from archsearch.scaling.solver import EXPONENT_BOUNDS, Problem, solve

Floats = NDArray[np.float64]
Metric = Literal["perplexity", "nats"]

DIMENSIONS = ("depth", "width", "tokens")
NAMES = {"depth": ("a", "alpha"), "width": ("b", "beta"), "tokens": ("c", "gamma")}
LEVELS = 3
HUBER = 1.345  # in standard deviations: 95 % of the efficiency of least squares on normal noise
LEVEL = 0.95


class LawNotIdentified(ConfigError):
    """The points cannot determine the law."""


@dataclass(frozen=True, slots=True)
class Point:
    """A trained model: blocks, hidden size, training tokens, validation loss in nats a token."""

    depth: int
    width: int
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fitted law with bootstrap draws of its parameters.

    Attributes:
        metric: what it predicts: perplexity, or nats a token.
        parameters: ``L0, a, alpha, b, beta`` and, with several budgets, ``c, gamma``.
        draws: the same parameters, one row a bootstrap repeat.
        residuals: relative errors of the fit, one a point.
        noise: standard deviation of the relative error, estimated from the residuals.
    """

    metric: Metric
    parameters: dict[str, float]
    draws: Floats
    residuals: Floats
    noise: float

    def interval(self, name: str) -> Estimate:
        """A parameter with its percentile interval, wide enough that 95 % hold for all exponents at once.

        The exponents share the error level by Bonferroni's rule, because they are read together.
        """
        exponents = (len(self.parameters) - 1) // 2
        column = self.draws[:, list(self.parameters).index(name)]
        return Estimate(self.parameters[name], *_ends(column, 1 - (1 - LEVEL) / exponents))

    @property
    def undetermined(self) -> list[str]:
        """Exponents that the data leave open: their interval reaches an end of what the solver allows."""
        low, high = EXPONENT_BOUNDS
        found = {name: self.interval(name) for name in list(self.parameters)[2::2]}
        return [name for name, e in found.items() if e.low <= low * 1.01 or e.high >= high * 0.99]

    def predict(self, depth: ArrayLike, width: ArrayLike, tokens: ArrayLike = 1) -> Floats:
        """Losses at depths, widths and budgets (broadcast together), in ``metric``, flat."""
        parameters = np.array([*self.parameters.values()])[None]
        return np.asarray(_losses(parameters, _sizes(depth, width, tokens))[0])

    def predict_interval(self, depth: int, width: int, tokens: int = 1) -> Estimate:
        """The loss of a model yet to be trained: uncertainty of the parameters and noise of a training together."""
        means = _losses(self.draws, _sizes(depth, width, tokens))[:, 0]
        noise = np.random.default_rng(0).normal(0.0, self.noise, len(means))
        return Estimate(float(self.predict(depth, width, tokens)[0]), *_ends(means * np.exp(noise), LEVEL))

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        estimates = {name: self.interval(name) for name in self.parameters}
        return {
            "metric": self.metric,
            "parameters": {name: {"value": e.value, "interval": [e.low, e.high]} for name, e in estimates.items()},
            "noise": self.noise,
            "worst_residual": float(np.abs(self.residuals).max()),
        }


def as_metric(losses: ArrayLike, metric: Metric) -> Floats:
    """Losses in nats a token as ``metric``; infinite where a perplexity is too large for a float."""
    array = np.asarray(losses, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.exp(array) if metric == "perplexity" else array


def fit_law(points: Sequence[Point], *, metric: Metric = "perplexity", repeats: int = 500, seed: int = 0) -> Law:
    """Fit the law and bootstrap its parameters.

    The grid is chosen, not drawn, so the bootstrap keeps it and redraws the errors: residuals, corrected
    for their leverage, with random signs, scaled by what so few of them can say about the noise.

    Args:
        points: trained models; the N term is fitted where they hold more than one budget.
        metric: what the law predicts. The paper fits perplexity (Section 3.1).
        repeats: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        LawNotIdentified: too few points or values of a dimension, a loss that is not finite, or no spread.
    """
    used = check_points(points, metric)
    logs = np.log(np.array([[getattr(point, name) for name in used] for point in points], dtype=np.float64))
    center = logs.mean(axis=0)
    problem = Problem(logs - center, np.log(as_metric([point.loss for point in points], metric)))
    theta, delta = _robust_fit(problem)
    fitted = problem.predict(theta)
    errors = _redraw(problem, theta, repeats, np.random.default_rng(seed))
    draws = _solve_from(problem, fitted + errors, [np.repeat(theta, repeats, axis=0)], delta)
    names = ["L0", *itertools.chain.from_iterable(NAMES[name] for name in used)]
    return Law(
        metric=metric,
        parameters=dict(zip(names, _natural(theta, center)[0].tolist(), strict=True)),
        draws=_natural(draws, center),
        residuals=np.expm1(problem.targets - fitted[0]),
        noise=_noise(problem, theta, delta),
    )


def check_points(points: Sequence[Point], metric: Metric) -> list[str]:
    """The dimensions that the law needs. Raises LawNotIdentified where the points cannot carry it."""
    values = as_metric([point.loss for point in points], metric)
    for point, value in zip(points, values, strict=True):
        if not (math.isfinite(value) and value > 0):
            where = f"depth {point.depth}, width {point.width}, {point.tokens:,} tokens"
            raise LawNotIdentified(f"the loss at {where} is {point.loss}", "leave that point out, or train it again")
    levels = {name: len({getattr(point, name) for point in points}) for name in DIMENSIONS}
    used = [name for name in DIMENSIONS if name != "tokens" or levels[name] > 1]
    for name in used:
        if levels[name] < LEVELS:
            remedy = f"run at least {LEVELS} values of {name}" + (", or a single one" if name == "tokens" else "")
            raise LawNotIdentified(
                f"{levels[name]} value(s) of {name} cannot tell {' from '.join(NAMES[name])}", remedy
            )
    needed = 1 + 2 * len(used)
    if len(points) <= needed:
        raise LawNotIdentified(f"{len(points)} points for {needed} parameters", f"run at least {needed + 1} points")
    if np.ptp(np.log(values)) < 1e-9:
        raise LawNotIdentified("the loss is the same everywhere", "train longer, or over a wider range of sizes")
    return used


def _robust_fit(problem: Problem) -> tuple[Floats, float]:
    """(parameters as one row, Huber's threshold): least squares, then twice with a threshold from its residuals."""
    targets = problem.targets[None]
    theta, delta = _solve_from(problem, targets, [], math.inf), math.inf
    for _ in range(2):
        residuals = targets - problem.predict(theta)
        spread = 1.4826 * float(np.median(np.abs(residuals))) * _inflation(problem)
        delta = max(HUBER * spread, 1e-7)
        theta = _solve_from(problem, targets, [theta], delta)
    return theta, delta


def _solve_from(problem: Problem, targets: Floats, starts: Sequence[Floats], delta: float) -> Floats:
    """The best solution of each row of targets, from ``starts`` and from the grid of exponents."""
    found = [solve(problem.inputs, targets, start, delta) for start in [*starts, problem.starts(targets)]]
    best = np.argmin([losses for _, losses in found], axis=0)
    return np.asarray(np.stack([theta for theta, _ in found])[best, np.arange(len(targets))])


def _inflation(problem: Problem) -> float:
    """What residuals of a fit must be multiplied by to have the size of the errors."""
    points, terms = problem.inputs.shape
    return math.sqrt(points / (points - 1 - 2 * terms))


def _noise(problem: Problem, theta: Floats, delta: float) -> float:
    """Standard deviation of the errors; an outlier counts as one three thresholds away."""
    residuals = np.clip(problem.targets - problem.predict(theta)[0], -3 * delta, 3 * delta)
    return float(np.sqrt((residuals**2).mean())) * _inflation(problem)


def _redraw(problem: Problem, theta: Floats, repeats: int, rng: np.random.Generator) -> Floats:
    """(repeats, points) errors; the chi-square factor is Student's, since the noise level is itself an estimate."""
    orthogonal, _ = np.linalg.qr(problem.jacobian(theta)[0])
    leverage = np.clip((orthogonal**2).sum(axis=1), 0.0, 0.99)
    errors = (problem.targets - problem.predict(theta)[0]) / np.sqrt(1 - leverage)
    shape, freedom = (repeats, len(errors)), len(errors) - theta.shape[1]
    drawn = rng.choice(errors, size=shape) * rng.choice([-1.0, 1.0], size=shape)
    return np.asarray(drawn * np.sqrt(freedom / rng.chisquare(freedom, size=(repeats, 1))))


def _natural(theta: Floats, center: Floats) -> Floats:
    """Rows ``L0, a, alpha, b, beta...`` from the solver's logarithms about the mean of the inputs."""
    natural = np.exp(theta)
    natural[:, 1::2] = np.exp(theta[:, 1::2] + natural[:, 2::2] * center)
    return natural


def _sizes(depth: ArrayLike, width: ArrayLike, tokens: ArrayLike) -> Floats:
    arrays = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (depth, width, tokens)))
    return np.stack([array.ravel() for array in arrays], axis=1)


def _losses(parameters: Floats, sizes: Floats) -> Floats:
    """(rows, points) losses of parameter rows at ``sizes``, (points, 3)."""
    terms = (parameters.shape[1] - 1) // 2
    powers = sizes[None, :, :terms] ** -parameters[:, None, 2::2]
    return np.asarray(parameters[:, :1] + (parameters[:, None, 1::2] * powers).sum(axis=2))


def _ends(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
