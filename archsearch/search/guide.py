"""Guide: which offspring are worth an evaluation. Surrogates for what is expensive, exact values for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

from archsearch.search.acquisition import expected_improvement
from archsearch.search.descriptors import Descriptors
from archsearch.search.genes import Codes, Floats, Genes
from archsearch.search.history import History
from archsearch.search.pareto import front
from archsearch.search.surrogate import Surrogate

MOST_ROWS = 300  # results that a prediction is conditioned on
MOST_PENDING = 256
PENDING_BATCHES = 64  # of running trials whose objectives are expected together
REFIT_GROWTH = 250  # results after which the models are refitted one result later
REFIT_RUNNING = 8  # the same for trials that run
MARGIN = 0.1  # of the reference point beyond the worst result, as a fraction of the range


class Guide:
    """Ranks candidates by their expected gain in hypervolume.

    Holds fitted models only to save time; a new object ranks the same.

    Args:
        genes: of the space.
        descriptors: what is known of genomes beside their genes; what any space has where None.
    """

    def __init__(self, genes: Genes, descriptors: Descriptors | None = None) -> None:
        self._genes = genes
        self.descriptors = descriptors or Descriptors(genes)
        self._models: dict[str, Surrogate] = {}
        self._learned_from: dict[str, tuple[object, bytes]] = {}
        self._expected: dict[str, dict[int, float]] = {}

    def gains(self, history: History, candidates: Codes, exact: Floats) -> Floats:
        """Expected gain of each candidate.

        Args:
            history: what is known.
            candidates: (c, genes).
            exact: (c, m) objectives that are known beforehand, NaN elsewhere.

        Returns:
            (c,) gains in the units of the hypervolume.

        Raises:
            SurrogateUnfit: nothing can be learned from the history.
        """
        done = self._learned(history)
        values = history.values[done]
        mean, std = self._predict(history, done, candidates, exact)
        reached = history.values[history.front[history.violations[history.front] <= 0]]
        low, high = values.min(axis=0), values.max(axis=0)
        expected = self._pending(history, done)
        points = np.concatenate([reached, expected])
        gains = expected_improvement(points, high + MARGIN * (high - low), mean, std)
        return gains * self._feasibility(history, done, candidates)

    def importance(self, history: History) -> Floats:
        """How much each gene matters, the mean over the objectives, (genes,), adding up to 1. Raises as ``gains``."""
        done = self._learned(history)
        shares = [self._fit(str(k), history, done, v).importance for k, v in enumerate(history.values[done].T)]
        return np.asarray(np.mean(shares, axis=0))

    def _learned(self, history: History) -> Codes:
        """The finished rows to learn from; many are taken in at once where many are known or many run."""
        rows = history.learned
        wanted = 1 + len(rows) // REFIT_GROWTH + int(history.running.sum()) // REFIT_RUNNING
        # Powers of two: as the number of running trials goes up and down, the same rows are learned from.
        stride = _power_of_two(wanted)
        return rows[: len(rows) - len(rows) % stride or _power_of_two(len(rows))]

    def _fit(self, name: str, history: History, rows: Codes, values: Floats) -> Surrogate:
        model = self._models.setdefault(name, Surrogate(self._genes, self.descriptors))
        # What has finished never changes.
        lesson = history.source, rows.tobytes()
        if self._learned_from.get(name) != lesson:
            model.fit(history.codes[rows], values, _conditioning(history.values[rows]))
            self._learned_from[name], self._expected[name] = lesson, {}
        return model

    def _predict(self, history: History, done: Codes, candidates: Codes, exact: Floats) -> tuple[Floats, Floats]:
        mean, std = exact.copy(), np.zeros(exact.shape)
        for objective in np.flatnonzero(np.isnan(exact).any(axis=0)):
            model = self._fit(str(objective), history, done, history.values[done, objective])
            predicted, spread = model.predict(candidates)
            unknown = np.isnan(exact[:, objective])
            mean[unknown, objective], std[unknown, objective] = predicted[unknown], spread[unknown]
        return mean, std

    def _pending(self, history: History, done: Codes) -> Floats:
        """What running trials are expected to give, so that their like is not proposed again beside them."""
        rows = np.flatnonzero(history.running)
        # The more run, the less the newest few matter; predicting them together saves most of the time.
        batch = _power_of_two(1 + len(rows) // PENDING_BATCHES)
        rows = rows[rows < len(history.numbers) - len(history.numbers) % batch][-MOST_PENDING:]
        columns = [self._expect(str(k), history, done, v, rows) for k, v in enumerate(history.values[done].T)]
        return np.stack(columns, axis=1)

    def _expect(self, name: str, history: History, done: Codes, values: Floats, rows: Codes) -> Floats:
        """What running rows are expected to give in one objective; each model predicts each of them once."""
        model, expected = self._fit(name, history, done, values), self._expected[name]
        new = [row for row in rows.tolist() if row not in expected]
        if new:
            expected.update(zip(new, model.expect(history.codes[new]).tolist(), strict=True))
        return np.array([expected[row] for row in rows.tolist()])

    def _feasibility(self, history: History, done: Codes, candidates: Codes) -> Floats:
        """Probability of keeping the constraints that have been broken so far, (c,)."""
        probability = np.ones(len(candidates))
        for index, column in enumerate(history.constraints.T):
            rows = done[np.isfinite(column[done])]
            if (column[rows] > 0).any():
                mean, std = self._fit(f"constraint {index}", history, rows, column[rows]).predict(candidates)
                probability *= ndtr(-mean / np.maximum(std, 1e-12))
        return probability


def _power_of_two(number: int) -> int:
    """The largest that is not above ``number``."""
    return 1 << (number.bit_length() - 1)


def _conditioning(values: Floats) -> Codes:
    """All rows of a short history; of a long one the front, the best of each objective and an even sample."""
    if len(values) <= MOST_ROWS:
        return np.arange(len(values))
    best = [np.argsort(column, kind="stable")[: MOST_ROWS // 8] for column in values.T]
    chosen = np.unique(np.concatenate([front(values)[: MOST_ROWS // 4], *best]))
    others = np.setdiff1d(np.arange(len(values)), chosen)
    even = np.linspace(0, len(others) - 1, MOST_ROWS - len(chosen)).astype(int)
    return np.sort(np.concatenate([chosen, others[even]]))


def exact_objectives(known: Sequence[dict[str, float]], objectives: Sequence[str], count: int) -> Floats:
    """(candidates, ``count``) array of the objectives known beforehand, NaN for the others."""
    array = np.full((len(known), count), np.nan)
    for row, values in enumerate(known):
        for index, name in enumerate(objectives[:count]):
            array[row, index] = values.get(name, np.nan)
    return array
