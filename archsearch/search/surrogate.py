"""A small model of an expensive objective, with uncertainty, that is refitted as results come.

scikit-learn's Gaussian process over the genes. The kernel adds a smooth part, for which genomes that
share genes are alike, and a quadratic part, which is what genes and pairs of genes contribute; the
second carries over to genomes far from all known ones, which decides in spaces of many genes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import config_context
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Kernel, Matern, WhiteKernel

from archsearch.search.descriptors import Descriptors
from archsearch.search.genes import Codes, Floats, Genes

FEWEST = 5
TUNED_ON = 128  # rows at most from which the kernel's parameters are found
FOREST_ON = 256  # the same for the importance of the genes
TREES = 60
LEAST = 0.8  # scale of all that hardly matters taken together, beside 1 for what matters most
GROWTH = 1.3  # they are found again when there are so many times more rows
SETTLED = 600  # rows after which they stay: finding them takes as long as twenty proposals
JITTER = 1e-8


class SurrogateUnfit(Exception):
    """There is nothing to learn from: too few results, or a constant objective."""


def features(genes: Genes, codes: Codes, scales: Floats | None = None) -> Floats:
    """Genomes as points: numbers in order keep their order, all other choices are equally far from each other.

    Args:
        genes: of the space.
        codes: (rows, genes).
        scales: (genes,) how far apart the extreme choices of each gene lie; 1 where None.

    Returns:
        (rows, features).
    """
    widths = np.where(genes.ordinal, 1, genes.sizes)
    first = np.concatenate([[0], np.cumsum(widths)[:-1]])
    rows = np.arange(len(codes))[:, None]
    points = np.zeros((len(codes), int(widths.sum())))
    points[rows, first + np.where(genes.ordinal, 0, codes)] = np.sqrt(0.5)
    points[:, first[genes.ordinal]] = codes[:, genes.ordinal] / (genes.sizes[genes.ordinal] - 1)
    return points if scales is None else points * np.repeat(scales, widths)


def gene_importance(genes: Genes, codes: Codes, values: Floats, described: Floats | None = None) -> Floats:
    """Share of the variance of ``values`` that a forest explains by each gene, adding up to 1.

    Args:
        genes: of the space.
        codes: (rows, genes).
        values: (rows,).
        described: (rows, descriptors) that the forest may use as well.

    Returns:
        (genes + descriptors,).
    """
    described = np.zeros((len(codes), 0)) if described is None else described
    forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=0)
    points = np.concatenate([features(genes, codes), described], axis=1)
    shares = forest.fit(points, values).feature_importances_
    widths = np.concatenate([np.where(genes.ordinal, 1, genes.sizes), np.ones(described.shape[1], dtype=np.int64)])
    total = np.add.reduceat(shares, np.concatenate([[0], np.cumsum(widths)[:-1]]))
    return np.asarray(total / total.sum() if total.sum() > 0 else np.full(len(total), 1 / len(total)))


class Warp:
    """Brings an objective into the model's scale: as it is, or on a logarithm above its minimum.

    The logarithm suits an objective whose bad values lie far apart; a sum of costs is best left as it is.
    """

    def __init__(self, values: Floats, *, logarithmic: bool) -> None:
        self.logarithmic = logarithmic
        self._low = float(values.min())
        self._unit = float(np.median(values)) - self._low or float(values.max()) - self._low
        if not self._unit > 1e-12 * max(abs(self._low), 1e-300):
            raise SurrogateUnfit("the objective is the same for all results")
        bent = self._bend(values)
        self._mean, self._std = float(bent.mean()), float(bent.std())

    def _bend(self, values: Floats) -> Floats:
        parts = (values - self._low) / self._unit + 0.5
        return np.log(parts) if self.logarithmic else parts

    def apply(self, values: Floats) -> Floats:
        """Into the model's scale; ``values`` are among those that it was made from."""
        return (self._bend(values) - self._mean) / self._std

    def invert(self, mean: Floats, std: Floats) -> tuple[Floats, Floats]:
        """A normal prediction back into the objective's scale, to first order."""
        bent = mean * self._std + self._mean
        parts = np.exp(bent) if self.logarithmic else bent
        slope = self._unit * (parts if self.logarithmic else np.ones(len(bent)))
        return (parts - 0.5) * self._unit + self._low, std * self._std * slope

    def log_slopes(self, values: Floats) -> float:
        """Sum of the logarithms of the derivative, which makes likelihoods of different warps comparable."""
        shrunk = self._bend(values).sum() if self.logarithmic else 0.0
        return float(-shrunk - len(values) * np.log(self._std))


@dataclass(frozen=True)
class Tuned:
    """What a surrogate finds out now and then: the likeliest kernel and warp, and what matters how much.

    ``scales`` are of genes and descriptors, (genes + descriptors,); ``importance`` is of the genes alone, (genes,).
    """

    kernel: Kernel
    logarithmic: bool
    scales: Floats
    importance: Floats


class Surrogate:
    """Predicts one objective of genomes.

    What it predicts depends on the rows it was fitted to alone. The kernel's parameters come from a
    first part of them that grows in steps up to ``SETTLED``, so that they are seldom found anew.

    Args:
        genes: of the space.
        descriptors: what is known of genomes beside their genes; what any space has where None.
    """

    def __init__(self, genes: Genes, descriptors: Descriptors | None = None) -> None:
        self._genes = genes
        self._descriptors = descriptors or Descriptors(genes)
        self._tuned: tuple[bytes, Tuned] | None = None
        self._fitted: bytes | None = None
        self._process = GaussianProcessRegressor()
        self._warp: Warp
        self._scales = np.ones(0)
        self.importance = np.ones(len(genes.sizes)) / len(genes.sizes)

    def fit(self, codes: Codes, values: Floats, chosen: Codes | None = None) -> None:
        """Learn from results.

        Args:
            codes: (rows, genes), oldest first.
            values: (rows,) finite.
            chosen: rows to condition the prediction on; all of them where None.

        Raises:
            SurrogateUnfit: too few or constant results, or a covariance that cannot be inverted.
        """
        if len(codes) < FEWEST:
            raise SurrogateUnfit(f"{len(codes)} results are too few")
        key = codes.tobytes() + values.tobytes()
        if key == self._fitted:
            return
        tuned = self._parameters(codes, values)
        self._scales, self.importance = tuned.scales, tuned.importance
        rows = np.arange(len(codes)) if chosen is None else chosen
        self._warp = Warp(values, logarithmic=tuned.logarithmic)
        self._process = _Conditioned(tuned.kernel, alpha=JITTER, optimizer=None)
        self._condition(self._process, codes[rows], self._warp.apply(values[rows]))
        self._fitted = key

    def predict(self, codes: Codes) -> tuple[Floats, Floats]:
        """Mean and standard deviation of what an evaluation will give, (rows,) each.

        That includes what the kernel takes for noise: most of it is a property of the architecture.
        """
        with config_context(assume_finite=True):
            mean, std = self._process.predict(self._points(codes), return_std=True)
        return self._warp.invert(mean, std)

    def expect(self, codes: Codes) -> Floats:
        """The means of ``predict`` alone, in a fraction of its time, (rows,)."""
        with config_context(assume_finite=True):
            mean = self._process.predict(self._points(codes))
        return self._warp.invert(mean, np.zeros(len(mean)))[0]

    def _points(self, codes: Codes) -> Floats:
        count = len(self._genes.sizes)
        described = self._descriptors(codes) * self._scales[count:]
        return np.concatenate([features(self._genes, codes, self._scales[:count]), described], axis=1)

    def _parameters(self, codes: Codes, values: Floats) -> Tuned:
        step = int(np.log(min(len(codes), SETTLED) / FEWEST) / np.log(GROWTH) + 1e-9)
        rows = min(len(codes), int(np.ceil(FEWEST * GROWTH**step)))
        key = codes[:rows].tobytes() + values[:rows].tobytes()
        if self._tuned is None or self._tuned[0] != key:
            self._tuned = key, self._tune(codes[:rows], values[:rows])
        return self._tuned[1]

    def _tune(self, codes: Codes, values: Floats) -> Tuned:
        """From even samples of these rows."""
        some = np.linspace(0, len(codes) - 1, min(len(codes), FOREST_ON)).astype(int)
        bent = Warp(values, logarithmic=True).apply(values)[some]
        importance = gene_importance(self._genes, codes[some], bent)
        shares = gene_importance(self._genes, codes[some], bent, self._descriptors(codes)[some])
        self._scales = np.maximum(np.sqrt(shares / shares.max()), LEAST / np.sqrt(len(shares)))
        some = np.linspace(0, len(codes) - 1, min(len(codes), TUNED_ON)).astype(int)
        found = []
        for logarithmic in (False, True):
            warp = Warp(values, logarithmic=logarithmic)
            process = GaussianProcessRegressor(_kernel(), alpha=JITTER)
            self._condition(process, codes[some], warp.apply(values[some]))
            likelihood = process.log_marginal_likelihood_value_ + warp.log_slopes(values[some])
            found.append((likelihood, process.kernel_, logarithmic))
        _, kernel, logarithmic = max(found, key=lambda one: one[0])
        return Tuned(kernel, logarithmic, self._scales, importance)

    def _condition(self, process: GaussianProcessRegressor, codes: Codes, scaled: Floats) -> None:
        try:
            with warnings.catch_warnings(), config_context(assume_finite=True):
                warnings.simplefilter("ignore")
                process.fit(self._points(codes), scaled)
        except (np.linalg.LinAlgError, ValueError) as error:
            raise SurrogateUnfit(str(error).splitlines()[0]) from error


class _Conditioned(GaussianProcessRegressor):  # type: ignore[misc]
    """A process whose kernel is given. The likelihood, which nobody asks for then, would double the time of a fit."""

    def log_marginal_likelihood(self, *words: Any, **options: Any) -> float:
        """Not computed."""
        return float("nan")


def _kernel() -> Kernel:
    smooth = ConstantKernel(0.5, (1e-2, 1e2)) * Matern(1.0, (0.1, 20.0), nu=2.5)
    quadratic = ConstantKernel(0.1, (1e-3, 1e2)) * DotProduct(1.0, "fixed") ** 2
    return smooth + quadratic + WhiteKernel(1e-2, (1e-6, 1.0))
