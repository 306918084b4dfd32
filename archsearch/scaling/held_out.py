"""How well the law foresees larger models: fitted without the largest depth and width, compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from archsearch.scaling.law import LEVELS, LawNotIdentified, Metric, Point, as_metric, check_points, fit_law

Scheme = Literal["largest depth and width", "corner"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model that the fit has not seen; losses in the law's metric, ``error`` relative and signed."""

    point: Point
    measured: float
    predicted: float
    error: float
    inside: bool


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions of larger models from smaller ones.

    Attributes:
        scheme: ``largest depth and width`` leaves out every model with either. ``corner`` leaves out only
            those with both, which asks less: depth and width have each been seen, only not together.
        fitted: number of models that the law was fitted on.
        predictions: the others.
    """

    scheme: Scheme
    fitted: int
    predictions: tuple[Prediction, ...]

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error."""
        return float(np.mean([abs(prediction.error) for prediction in self.predictions]))

    @property
    def worst_error(self) -> float:
        """Largest absolute relative error; the paper reports 5.3 % of perplexity (Section 3.1)."""
        return max(abs(prediction.error) for prediction in self.predictions)

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "scheme": self.scheme,
            "fitted": self.fitted,
            "mean_error": self.mean_error,
            "worst_error": self.worst_error,
            "predictions": [
                {
                    "depth": p.point.depth,
                    "width": p.point.width,
                    "tokens": p.point.tokens,
                    "measured": p.measured,
                    "predicted": p.predicted,
                    "error": p.error,
                    "inside_interval": p.inside,
                }
                for p in self.predictions
            ],
        }


def held_out(points: Sequence[Point], *, metric: Metric = "perplexity", seed: int = 0) -> HeldOut:
    """Fit on the smaller models and predict the larger ones.

    Raises:
        LawNotIdentified: the smaller models alone cannot carry the law.
    """
    check_points(points, metric)
    deepest, widest = max(point.depth for point in points), max(point.width for point in points)
    levels = min(len({point.depth for point in points}), len({point.width for point in points}))
    scheme: Scheme = "largest depth and width" if levels > LEVELS else "corner"
    needed = 1 if scheme == "largest depth and width" else 2
    larger = [point for point in points if (point.depth == deepest) + (point.width == widest) >= needed]
    if not larger:
        raise LawNotIdentified(f"no model has depth {deepest} and width {widest}", "train that one too")
    return _compare([point for point in points if point not in larger], larger, scheme, metric, seed)


def _compare(smaller: Sequence[Point], larger: Sequence[Point], scheme: Scheme, metric: Metric, seed: int) -> HeldOut:
    law = fit_law(smaller, metric=metric, seed=seed)
    predictions = []
    for point, measured in zip(larger, as_metric([point.loss for point in larger], metric).tolist(), strict=True):
        estimate = law.predict_interval(point.depth, point.width, point.tokens)
        inside = estimate.low <= measured <= estimate.high
        predictions.append(Prediction(point, measured, estimate.value, estimate.value / measured - 1, inside))
    return HeldOut(scheme, len(smaller), tuple(predictions))
