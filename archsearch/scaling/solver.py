"""Many small robust fits at once: Levenberg-Marquardt on sums of powers, one row a fit, analytic Jacobian."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPONENT_BOUNDS = (0.01, 10.0)
GRID = {2: 16, 3: 8}  # exponents tried a term, by the number of terms
DEEPEST = 12.0  # a term may be e^12 times smaller than the smallest loss: nothing that data can tell from zero


@dataclass(frozen=True)
class Problem:
    """Targets and inputs of ``log(L0 + sum_k a_k exp(-alpha_k x_k))``.

    Parameters are rows ``log L0, log a_1, log alpha_1, log a_2, ...``: everything is positive by form.

    Attributes:
        inputs: logarithms of the sizes about their mean, (points, terms).
        targets: logarithms of the losses, (points,).
    """

    inputs: Floats
    targets: Floats

    def predict(self, theta: Floats) -> Floats:
        """(rows, points) predictions of (rows, parameters)."""
        return _model(self.inputs, theta)[0]

    def jacobian(self, theta: Floats) -> Floats:
        """(rows, points, parameters) derivatives of the predictions."""
        return _model(self.inputs, theta)[1]

    def starts(self, targets: Floats) -> Floats:
        """For each row of targets, (rows, points), the best point of a grid of exponents as parameters.

        With the exponents given the law is linear: a grid point costs one projection, shared by all rows.
        """
        chosen, design, inverse = self._grid
        scaled = np.exp(targets - self.targets).T
        linear = inverse @ scaled
        explained = (linear * (np.swapaxes(design, 1, 2) @ scaled)).sum(axis=1)
        best = np.where((linear > 0).all(axis=1), explained, -np.inf).argmax(axis=0)
        smallest = 1e-3 * np.exp(self.targets.min())
        logs = np.log(np.maximum(linear[best, :, np.arange(targets.shape[0])], smallest))
        theta = np.empty((len(targets), 1 + 2 * self.inputs.shape[1]))
        theta[:, 0], theta[:, 1::2], theta[:, 2::2] = logs[:, 0], logs[:, 1:], np.log(chosen[best])
        return theta

    @cached_property
    def _grid(self) -> tuple[Floats, Floats, Floats]:
        """(exponents, designs, their inverses) of every grid point, weighted for relative errors."""
        terms = self.inputs.shape[1]
        axis = np.geomspace(0.05, 4.0, GRID[terms])
        chosen = np.array(list(itertools.product(axis, repeat=terms)))
        powers = np.exp(-self.inputs[None] * chosen[:, None, :])
        design = np.concatenate([np.ones((len(chosen), len(self.targets), 1)), powers], axis=2)
        design = design * np.exp(-self.targets)[:, None]
        return chosen, design, np.linalg.pinv(design)


def solve(inputs: Floats, targets: Floats, starts: Floats, delta: float, steps: int = 60) -> tuple[Floats, Floats]:
    """Minimise Huber's loss of each row from its start.

    Args:
        inputs: (points, terms).
        targets: (rows, points).
        starts: (rows, parameters).
        delta: residual above which the loss grows linearly.
        steps: iterations.

    Returns:
        parameters, (rows, parameters), and their losses, (rows,).
    """
    low, high = _bounds(targets, starts.shape[1])
    theta = np.clip(starts, low, high)
    losses, damping = _huber(targets - _model(inputs, theta)[0], delta), np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    for _ in range(steps):
        predictions, jacobian = _model(inputs, theta[active])
        step = _step(targets[active] - predictions, jacobian, damping[active], delta)
        candidates = np.clip(theta[active] + step, low, high)
        new = _huber(targets[active] - _model(inputs, candidates)[0], delta)
        gains = losses[active] - new
        better = gains > 0
        theta[active[better]], losses[active[better]] = candidates[better], new[better]
        damping[active] *= np.where(better, 0.3, 5.0)
        # Converged rows leave: most of them need a few steps only.
        active = active[~(better & (gains < 1e-9 * new)) & (damping[active] < 1e8)]
        if not len(active):
            break
    return theta, losses


def _model(inputs: Floats, theta: Floats) -> tuple[Floats, Floats]:
    exponents = np.exp(theta[:, None, 2::2])
    terms = np.exp(theta[:, None, 1::2] - exponents * inputs)
    floor = np.exp(theta[:, :1])
    total = floor + terms.sum(axis=2)
    jacobian = np.empty((*total.shape, theta.shape[1]))
    shares = terms / total[:, :, None]
    jacobian[:, :, 0] = floor / total
    jacobian[:, :, 1::2] = shares
    jacobian[:, :, 2::2] = -shares * inputs * exponents
    return np.log(total), jacobian


def _step(residuals: Floats, jacobian: Floats, damping: Floats, delta: float) -> Floats:
    weights = np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
    weighted = jacobian * weights[:, :, None]
    normal = np.swapaxes(weighted, 1, 2) @ jacobian
    gradient = (weighted * residuals[:, :, None]).sum(axis=1)
    scale = np.einsum("rii->ri", normal) + 1e-12
    index = np.arange(normal.shape[1])
    normal[:, index, index] += damping[:, None] * scale
    return np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]


def _huber(residuals: Floats, delta: float) -> Floats:
    size = np.abs(residuals)
    if np.isinf(delta):
        losses = 0.5 * size**2
    else:
        losses = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return np.asarray(losses.sum(axis=1))


def _bounds(targets: Floats, parameters: int) -> tuple[Floats, Floats]:
    smallest, largest = float(targets.min()), float(targets.max())
    low = np.full(parameters, smallest - DEEPEST)
    high = np.full(parameters, largest)
    low[2::2], high[2::2] = np.log(EXPONENT_BOUNDS)
    return low, high
