"""Rungs: what the results of a search say about candidates that are still training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation
from archsearch.search.pareto import front
from archsearch.search.study import Candidate
from archsearch.stopping import LOSS, Line, StoppingRule

FLAT = 1e-12


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
        lines = {tokens: line for tokens in self._rungs if (line := self._line(tokens, numbers)) is not None}
        return StoppingRule(objectives=self._objectives, front=members, lines=lines)

    def _line(self, tokens: int, numbers: Sequence[int]) -> Line | None:
        pairs = [
            (rung.objectives[LOSS], self._ended[number].objectives[LOSS])
            for number in numbers
            for rung in self._ended[number].rungs
            if rung.tokens == tokens
        ]
        return fit_line(pairs, self._config.confidence) if len(pairs) >= self._config.minimum else None


def fit_line(pairs: Sequence[tuple[float, float]], confidence: float) -> Line | None:
    """The line from losses at a rung to last losses; None where there is none that rises.

    Args:
        pairs: (loss at the rung, last loss), three at least.
        confidence: one-sided, of a prediction.
    """
    early, last = np.asarray(pairs, dtype=np.float64).T
    mean = float(early.mean())
    spread = float(((early - mean) ** 2).sum())
    if spread <= FLAT:
        return None
    slope = float(((early - mean) * (last - last.mean())).sum() / spread)
    if slope <= 0:
        return None
    intercept = float(last.mean()) - slope * mean
    freedom = len(pairs) - 2
    deviation = float(np.sqrt(((last - slope * early - intercept) ** 2).sum() / freedom))
    width = float(t.ppf(confidence, freedom)) * deviation
    return Line(slope=slope, intercept=intercept, width=width, count=len(pairs), mean=mean, spread=spread)


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
