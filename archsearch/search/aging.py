"""AgingEvolutionSampler: proposes what to evaluate next, from nothing but the study and its own settings."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial

from archsearch.errors import ArchsearchError
from archsearch.search.breeding import AgingSettings, Breeding, Lineage, Pool
from archsearch.search.descriptors import Descriptors
from archsearch.search.design import spread
from archsearch.search.genes import Choice, Codes, Floats, Genes
from archsearch.search.guide import Guide, exact_objectives
from archsearch.search.history import History, HistoryReader
from archsearch.search.surrogate import SurrogateUnfit
from archsearch.search.threads import one_thread

Cheap = Callable[[Mapping[str, Any]], Mapping[str, float]]
Draws = Iterator[tuple[Codes, Lineage]]

ENUMERABLE = 100_000  # genomes of a space that is searched through when draws find nothing new
SHORTLIST = 48  # candidates whose cheap objectives are computed
PATIENCE = 50  # draws that fail before one gene more is mutated
SATURATED = 500  # results from which on ``unguided`` holds in full
REMEMBERED = 10_000


class SpaceExhausted(ArchsearchError):
    """No architecture is left that is feasible and new."""


class SettingsError(ArchsearchError):
    """Settings of the sampler that contradict each other."""

    exit_code = 3


class Space(Protocol):
    """What the sampler must know of a search space."""

    @property
    def genes(self) -> Mapping[str, Sequence[Choice]]:
        """Gene to choices."""
        ...

    @property
    def seed_genomes(self) -> Sequence[Mapping[str, Choice]]:
        """Genomes that are proposed before any other."""
        ...

    def identity(self, genome: Mapping[str, Any]) -> str | None:
        """The id of the architecture that ``genome`` builds; None where it is infeasible."""
        ...


class GeneSpace:
    """A space whose every genome is a different, feasible architecture, such as a table."""

    def __init__(self, genes: Mapping[str, Sequence[Choice]], seeds: Sequence[Mapping[str, Choice]] = ()) -> None:
        self.genes = {name: tuple(choices) for name, choices in genes.items()}
        self.seed_genomes = tuple(seeds)

    def identity(self, genome: Mapping[str, Any]) -> str | None:
        """The genes themselves."""
        return repr([genome[name] for name in self.genes])


class AgingEvolutionSampler(BaseSampler):
    """Ageing evolution (Real et al. 2019), guided by surrogates.

    A population forgets its oldest members; tournaments and the Pareto front give parents; offspring
    differ in few genes. The default mode draws many offspring for each evaluation and proposes the one
    with the greatest expected gain in hypervolume. ``mode="paper"`` is Algorithm 1 of Nemotron-Flash
    (arXiv 2511.18890): the lowest first objective under a latency target, parents from the population only.

    Each proposal is drawn with a generator seeded by ``seed`` and the number of complete genomes
    before it, so a study that was interrupted goes on as if it had not been, with one worker.

    Args:
        space: what may be proposed. Without one the genes are those that all finished trials share,
            and architectures repeat once the genes are exhausted.
        objectives: names of the study's objectives, in their order; needed with ``cheap``.
        cheap: objectives of a genome that are known without an evaluation, by name. Called for
            feasible genomes only.
        ceilings: values of ``cheap`` above which a genome is infeasible.
        seed: drawn at random where None.
        settings: fields of ``AgingSettings``.
    """

    def __init__(
        self,
        space: Space | None = None,
        *,
        objectives: Sequence[str] = (),
        cheap: Cheap | None = None,
        ceilings: Mapping[str, float] | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self._settings = AgingSettings(**settings)
        self._space = space
        self._objectives = tuple(objectives)
        self._cheap = cheap
        self._ceilings = dict(ceilings or {})
        self._check_paper()
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._reader = HistoryReader(self._identity)
        self._genes: Genes | None = None
        self._guide: tuple[Genes, Guide] | None = None
        self._identities: dict[tuple[int, ...], str | None] = {}
        self._lineage: dict[int, Lineage] = {}

    def lineage(self, trial_number: int) -> Lineage:
        """Where a proposal came from: its ``kind``, ``parent`` (trial number or None) and mutated ``genes``.

        ``surrogate`` is there where no surrogate could be fitted, and says why. Only the last
        proposals of this object are known; an empty dict stands for all others. A driver that writes
        it as the trial's user attribute ``lineage`` lets mutation rates adapt.
        """
        return self._lineage.get(trial_number, {})

    def reseed_rng(self) -> None:
        """Nothing to do: each proposal seeds its own generator."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The genes of the space, or those that all finished trials share."""
        if self._space is not None:
            return {name: CategoricalDistribution(list(values)) for name, values in self._space.genes.items()}
        shared = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: kind for name, kind in shared.items() if isinstance(kind, CategoricalDistribution)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, for what is no gene of the space."""
        seed = np.random.SeedSequence([self._seed, trial.number, zlib.crc32(param_name.encode())]).generate_state(1)[0]
        return RandomSampler(seed=int(seed)).sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next genome.

        Raises:
            SpaceExhausted: no architecture is left that is feasible and new.
        """
        choices = {n: d.choices for n, d in search_space.items() if isinstance(d, CategoricalDistribution)}
        others = {n: d for n, d in search_space.items() if n not in choices}
        params = {n: self.sample_independent(study, trial, n, d) for n, d in others.items()}
        if not choices:
            return params
        genes = self._genes = _same(Genes.of(choices), self._genes)
        history = self._reader.read(study, genes, trial.number)
        rng = np.random.default_rng([self._seed, len(history.numbers)])
        with one_thread():
            codes, lineage = self._propose(genes, history, rng)
        self._lineage[trial.number] = lineage
        if len(self._lineage) > REMEMBERED:
            del self._lineage[next(iter(self._lineage))]
        return genes.decode(codes) | params

    # What is proposed: the first draw that is new and feasible

    def _propose(self, genes: Genes, history: History, rng: np.random.Generator) -> tuple[Codes, Lineage]:
        known = history.identities
        left = len(history.genomes) < genes.count
        for codes, lineage in self._draws(genes, history, rng) if left else ():
            identity = self._identity(genes, tuple(codes.tolist()))
            if identity is not None and identity not in known:
                return codes, lineage
        if self._space is None:
            return genes.random(rng, 1)[0], _parentless("repeat")
        raise SpaceExhausted(
            f"no new feasible architecture found in {self._settings.max_tries} draws; {len(known)} are known",
            "the search is over for this space; widen the space or its limits to go on",
        )

    def _identity(self, genes: Genes, codes: tuple[int, ...]) -> str | None:
        if self._space is None:
            return repr(codes)
        if codes not in self._identities:
            genome = genes.decode(codes)
            identity = self._space.identity(genome)
            self._identities[codes] = None if identity is None or self._too_dear(genome) else identity
        return self._identities[codes]

    def _too_dear(self, genome: Mapping[str, Any]) -> bool:
        """Whether a feasible genome is above a ceiling."""
        if self._cheap is None or not self._ceilings:
            return False
        known = self._cheap(genome)
        return any(known[name] > ceiling for name, ceiling in self._ceilings.items())

    def _draws(self, genes: Genes, history: History, rng: np.random.Generator) -> Draws:
        """Proposals in the order in which they are to be tried."""
        for genome in self._space.seed_genomes if self._space is not None else ():
            codes = genes.encode(genome)
            if codes is not None:
                yield np.array(codes), _parentless("seed")
        if len(history.numbers) < self._settings.population_size or len(history.finished) == 0:
            yield from self._first(genes, history, rng)
        elif self._settings.mode == "paper":
            yield from self._paper(genes, history, rng)
        else:
            yield from self._default(genes, history, rng)
        if genes.count <= ENUMERABLE:
            for index in rng.permutation(genes.count):
                yield np.array(np.unravel_index(index, genes.sizes)), _parentless("random")

    def _first(self, genes: Genes, history: History, rng: np.random.Generator) -> Draws:
        designed = self._settings.design and self._settings.mode == "default"
        # Many workers ask long before the first result; past a population a design gains nothing.
        if designed and len(history.numbers) < self._settings.population_size:
            for codes in spread(genes, rng, history.codes, self._guide_for(genes).descriptors):
                yield codes, _parentless("design")
        for _ in range(self._settings.max_tries):
            yield self._fitted(genes, genes.random(rng, 1)[0]), _parentless("random")

    def _default(self, genes: Genes, history: History, rng: np.random.Generator) -> Draws:
        breeding = Breeding(genes, history, self._settings, rng)
        note = {}
        # The longer the search, the less is left that the surrogates can tell; early on they tell most.
        unguided = self._settings.unguided * min(1.0, len(history.finished) / SATURATED) ** 2
        if self._settings.surrogate and rng.random() >= unguided:
            try:
                yield from self._guided(genes, history, breeding)
            except SurrogateUnfit as error:
                note = {"surrogate": str(error)}
        for attempt in range(self._settings.max_tries):
            codes, lineage = breeding.offspring(1 + attempt // PATIENCE)
            yield codes, lineage | note

    def _guided(self, genes: Genes, history: History, breeding: Breeding) -> Draws:
        guide = self._guide_for(genes)
        pool = breeding.pool(guide.importance(history))
        for row in self._ranked(guide, genes, history, pool):
            yield pool.codes[row], breeding.pool_lineage(pool, row)

    def _guide_for(self, genes: Genes) -> Guide:
        """Kept as long as the genes stay the same."""
        if self._guide is None or self._guide[0] != genes:
            space = self._space if self._settings.descriptors else None
            self._guide = genes, Guide(genes, Descriptors(genes, space))
        return self._guide[1]

    def _ranked(self, guide: Guide, genes: Genes, history: History, pool: Pool) -> list[int]:
        """Rows of the pool, the greatest expected gain first."""
        if len(pool.codes) == 0:
            return []
        exact = np.full((len(pool.codes), history.values.shape[1]), np.nan)
        order: list[int] = np.argsort(-guide.gains(history, pool.codes, exact), kind="stable").tolist()
        if self._cheap is None:
            return order
        head = [row for row in order[:SHORTLIST] if self._identity(genes, tuple(pool.codes[row].tolist())) is not None]
        exact = self._exact(genes, pool.codes[head], history.values.shape[1])
        gains = guide.gains(history, pool.codes[head], exact)
        return [head[i] for i in np.argsort(-gains, kind="stable")] + order[SHORTLIST:]

    def _exact(self, genes: Genes, codes: Codes, count: int) -> Floats:
        assert self._cheap is not None
        known = [dict(self._cheap(genes.decode(row))) for row in codes]
        return exact_objectives(known, self._objectives, count)

    # The paper's mode

    def _check_paper(self) -> None:
        name, width = self._settings.latency_objective, self._settings.fit_width
        if self._settings.latency_target is not None and self._cheap is None and name not in self._objectives:
            raise SettingsError(f"latency_target needs {name!r}, which is no objective", "make it one")
        if width is None:
            return
        if self._settings.latency_target is None or self._cheap is None:
            raise SettingsError("fit_width needs a latency_target and a latency known beforehand", "give both")
        if self._space is None or width not in self._space.genes:
            raise SettingsError(f"fit_width: the space has no gene {width!r}", "name a gene of the space")

    def _paper(self, genes: Genes, history: History, rng: np.random.Generator) -> Draws:
        breeding = Breeding(genes, history, self._settings, rng)
        violations = history.violations + self._excess(genes, history)
        for attempt in range(self._settings.max_tries):
            parent = breeding.paper_parent(violations)
            child = breeding.child(parent, 1 + attempt // PATIENCE, self._settings.fit_width)
            child = self._fitted(genes, child)
            yield child, breeding.lineage(child, parent, from_front=False)

    def _excess(self, genes: Genes, history: History) -> Floats:
        """By how much each trial misses the latency target, (trials,)."""
        target, name = self._settings.latency_target, self._settings.latency_objective
        if target is None:
            return np.zeros(len(history.numbers))
        if name in self._objectives:
            latencies = history.values[:, self._objectives.index(name)]
        else:
            latencies = np.array([self._latency(genes, codes) for codes in history.codes])
        return np.maximum(latencies - target, 0.0)

    def _latency(self, genes: Genes, codes: Codes) -> float:
        assert self._cheap is not None
        return self._cheap(genes.decode(codes))[self._settings.latency_objective]

    def _fitted(self, genes: Genes, codes: Codes) -> Codes:
        """``codes`` with the width gene at the largest choice whose latency meets the target, or at its smallest."""
        name, target = self._settings.fit_width, self._settings.latency_target
        if name is None or target is None or self._settings.mode != "paper":
            return codes
        index = genes.names.index(name)
        choices: Any = genes.choices[index]
        widths = sorted(range(len(choices)), key=lambda i: choices[i], reverse=True)
        for width in widths:
            codes = np.where(np.arange(len(codes)) == index, width, codes)
            feasible = self._identity(genes, tuple(codes.tolist())) is not None
            if feasible and self._latency(genes, codes) <= target:
                break
        return codes


def _same(genes: Genes, before: Genes | None) -> Genes:
    """``before``, which knows what it has computed, where it is the same."""
    return before if genes == before and before is not None else genes


def _parentless(kind: str) -> Lineage:
    return {"kind": kind, "parent": None, "genes": []}
