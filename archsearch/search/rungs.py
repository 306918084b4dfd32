"""Rungs: what the results of a search say about candidates that are still training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation
from archsearch.search.pareto import front
from archsearch.search.study import Candidate
from archsearch.stopping import LOSS, Forecast, StoppingRule, features

FEWEST_FREE = 2
"""Degrees of freedom below which a deviation says too little."""
RANK_TOLERANCE = 1e-7
"""Relative size below which a direction of the features counts as absent, such as an objective that is constant."""


class Rungs:
    """Keeps the results that went past rungs, and makes the rule for the next candidate of them.

    Args:
        config: ``proxy.rungs`` may be empty; then there is no rule.
    """

    def __init__(self, config: RunConfig) -> None:
        self._rungs = config.proxy.rungs[:-1]
        self._objectives = config.search.objectives
        self._config = config.search.stopping
        self._ended: dict[int, Evaluation] = {}
        self._rule: StoppingRule | None = None

    @property
    def on(self) -> bool:
        """Whether candidates may be stopped at all."""
        return bool(self._rungs)

    def add(self, number: int, evaluation: Evaluation) -> None:
        """Take in the result of a trial. Only those that were trained to the end say how a training ends."""
        if self.on and evaluation.ok:
            self._ended[number] = evaluation
            self._rule = None

    def expected(self, evaluation: Evaluation) -> list[float] | None:
        """The objectives that a stopped candidate would likely have had, in the order of the search; else None."""
        if evaluation.verdict is None:
            return None
        known = evaluation.rungs[-1].objectives | {LOSS: evaluation.verdict.expected}
        return [known[name] for name in self._objectives]

    def rule(self) -> StoppingRule | None:
        """What to give to the next candidate; None without rungs."""
        if self.on and self._rule is None:
            self._rule = self._make()
        return self._rule

    def _make(self) -> StoppingRule:
        numbers = sorted(self._ended)
        if len(numbers) < self._config.minimum:
            return StoppingRule(objectives=self._objectives)
        points = [tuple(self._ended[n].objectives[name] for name in self._objectives) for n in numbers]
        members = tuple((numbers[index], points[index]) for index in front(points))
        found = {tokens: self._forecast(tokens, numbers) for tokens in self._rungs}
        forecasts = {tokens: forecast for tokens, forecast in found.items() if forecast is not None}
        return StoppingRule(objectives=self._objectives, front=members, forecasts=forecasts)

    def _forecast(self, tokens: int, numbers: Sequence[int]) -> Forecast | None:
        pairs = [
            (features(self._objectives, rung.objectives), self._ended[number].objectives[LOSS])
            for number in numbers
            for rung in self._ended[number].rungs
            if rung.tokens == tokens
        ]
        if len(pairs) < self._config.minimum:
            return None
        return fit_forecast([x for x, _ in pairs], [loss for _, loss in pairs], self._config.confidence)


def fit_forecast(rows: Sequence[Sequence[float]], last: Sequence[float], confidence: float) -> Forecast | None:
    """The least-squares forecast; None where too few results carry it, or a higher loss foretells no higher one.

    Args:
        rows: ``features`` at the rung of those that ended.
        last: their last losses.
        confidence: one-sided, of a prediction.
    """
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(last, dtype=np.float64)
    # Columns of very different size would be lost in the pseudo-inverse.
    scale = np.abs(x).max(axis=0)
    scale[scale == 0] = 1.0
    z = x / scale
    rank = _rank(z)
    inverse = np.linalg.pinv(z.T @ z, rcond=RANK_TOLERANCE**2, hermitian=True) / np.outer(scale, scale)
    weights = inverse @ x.T @ y
    freedom = len(y) - rank
    tells = _rank(np.delete(z, 1, axis=1)) < rank  # whether the losses are more than a function of the rest
    if freedom < FEWEST_FREE or not tells or weights[1] <= 0:
        return None
    deviation = float(np.sqrt(((y - x @ weights) ** 2).sum() / freedom))
    return Forecast(
        weights=tuple(weights.tolist()),
        width=float(t.ppf(confidence, freedom)) * deviation,
        inverse=tuple(tuple(row) for row in inverse.tolist()),
    )


def _rank(z: NDArray[np.float64]) -> int:
    return int(np.linalg.matrix_rank(z, tol=RANK_TOLERANCE * np.sqrt(len(z))))


@dataclass(frozen=True, slots=True)
class Savings:
    """What rungs saved: ``stopped`` at each rung, tokens trained, and tokens without rungs."""

    stopped: dict[int, int]
    trained: int
    without: int

    @property
    def share(self) -> float:
        """Part of the tokens that was not trained."""
        return 1 - self.trained / self.without if self.without else 0.0


def savings(config: RunConfig, candidates: Sequence[Candidate]) -> Savings | None:
    """What the rungs of a run saved on the candidates that were trained to a rung or the end; None without rungs."""
    if not config.proxy.rungs:
        return None
    found = [c.evaluation for c in candidates if c.is_distinct and c.evaluation is not None]
    stopped = [evaluation.verdict.tokens for evaluation in found if evaluation.verdict is not None]
    ended = sum(evaluation.ok for evaluation in found)
    last = config.proxy.rungs[-1]
    counts = {tokens: stopped.count(tokens) for tokens in config.proxy.rungs[:-1]}
    return Savings(counts, sum(stopped) + ended * last, (len(stopped) + ended) * last)
