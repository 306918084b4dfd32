"""AgingEvolutionSampler: Optuna's own kits, then what archsearch promises beyond them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from optuna.trial import TrialState
from pydantic import ValidationError

from archsearch.search.aging import AgingEvolutionSampler, GeneSpace, SettingsError, SpaceExhausted
from archsearch.search.genes import Genes
from archsearch.search.pareto import hypervolume

LAYERS = {f"op{i}": ("a", "d", "f") for i in range(6)} | {"width": (1, 2, 4, 8)}
NAMES = ("loss", "latency", "size")


def objectives(genome: Mapping[str, Any], count: int = 2) -> list[float]:
    """Good operators and width cost time."""
    ops = [genome[f"op{i}"] for i in range(6)]
    worth = sum({"a": 2.0, "d": 1.0, "f": 0.5}[op] * (1 + 0.1 * i) for i, op in enumerate(ops)) + 0.5 * ops.count("f")
    time = sum({"a": 1.5, "d": 1.0, "f": 0.2}[op] for op in ops) * (1 + genome["width"] / 4)
    return [10 / (worth + genome["width"]), time, float(genome["width"] * 3 + ops.count("a"))][:count]


def new_study(count: int = 2) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * count)


def ask(study: optuna.Study, sampler: BaseSampler, genes: Mapping[str, Any] = LAYERS) -> optuna.Trial:
    study.sampler = sampler
    return study.ask({name: CategoricalDistribution(list(choices)) for name, choices in genes.items()})


def search(study: optuna.Study, sampler: AgingEvolutionSampler, trials: int, count: int = 2) -> list[dict[str, Any]]:
    for _ in range(trials):
        trial = ask(study, sampler)
        trial.set_user_attr("lineage", sampler.lineage(trial.number))
        study.tell(trial, objectives(trial.params, count))
    return [trial.params for trial in study.trials]


def make(**settings: Any) -> AgingEvolutionSampler:
    defaults: dict[str, Any] = {"seed": 3, "population_size": 8, "candidates": 64}
    return AgingEvolutionSampler(settings.pop("space", GeneSpace(LAYERS)), **defaults | settings)


class TestOptunaKits(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Everything that Optuna asks of a sampler."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: AgingEvolutionSampler(population_size=4, seed=1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_never_proposes_twice_with_any_number_of_objectives(count: int) -> None:
    genomes = search(new_study(count), make(), 24, count)
    assert len({tuple(genome.values()) for genome in genomes}) == 24


def test_an_interrupted_study_goes_on_as_if_it_had_not_been() -> None:
    whole = search(new_study(), make(), 24)
    study = new_study()
    for _ in range(4):
        search(study, make(), 6)
    assert [trial.params for trial in study.trials] == whole
    assert search(new_study(), make(seed=4), 10) != whole[:10]


def test_a_trial_without_all_genes_does_not_count() -> None:
    whole = search(new_study(), make(), 12)
    study = new_study()
    search(study, make(), 10)
    broken = study.ask()
    broken.suggest_categorical("op0", ["a", "d", "f"])
    study.tell(broken, state=TrialState.FAIL)
    assert [trial.params for trial in search_rest(study, 2)] == whole[10:]


def search_rest(study: optuna.Study, trials: int) -> list[Any]:
    before = len(study.trials)
    search(study, make(), trials)
    return study.trials[before:]


def test_running_trials_are_known() -> None:
    study, sampler = new_study(), make()
    search(study, sampler, 10)
    flying = [ask(study, sampler).params for _ in range(20)]
    assert len({tuple(genome.values()) for genome in flying}) == 20


def test_failed_and_infinite_trials_are_known_but_no_parents() -> None:
    study, sampler = new_study(), make()
    search(study, sampler, 8)
    failed = ask(study, sampler)
    study.tell(failed, state=TrialState.FAIL)
    infinite = ask(study, sampler)
    study.tell(infinite, [float("-inf"), 0.0])
    genomes = search(study, sampler, 30)
    assert len({tuple(genome.values()) for genome in genomes}) == 40
    parents = {sampler.lineage(trial.number).get("parent") for trial in study.trials}
    assert not parents & {failed.number, infinite.number}


def test_lineage_says_what_was_mutated() -> None:
    study, sampler = new_study(), make(surrogate=False)
    search(study, sampler, 30)
    kinds = {sampler.lineage(trial.number)["kind"] for trial in study.trials}
    assert kinds == {"design", "mutation", "front mutation"}
    for trial in study.trials[8:]:
        lineage = sampler.lineage(trial.number)
        parent = study.trials[lineage["parent"]].params
        assert lineage["genes"] == [name for name in LAYERS if trial.params[name] != parent[name]]
        assert 1 <= len(lineage["genes"]) <= 2
    assert sampler.lineage(999) == {}


def test_seeds_come_first_each_once() -> None:
    seeds = [dict.fromkeys(list(LAYERS)[:6], op) | {"width": 8} for op in ("a", "f", "a")]
    genomes = search(new_study(), make(space=GeneSpace(LAYERS, seeds)), 12)
    assert genomes[:2] == seeds[:2]
    assert seeds[0] not in genomes[2:]


def test_the_guided_search_finds_more_than_the_plain_one() -> None:
    def covered(**settings: Any) -> float:
        gains = []
        for seed in range(3):
            points = [objectives(genome) for genome in search(new_study(), make(seed=seed, **settings), 40)]
            gains.append(hypervolume(points, [4.0, 30.0]))
        return float(np.mean(gains))

    assert covered() > covered(surrogate=False, design=False)


# Spaces that end


class Picky(GeneSpace):
    """Feasible where ``op0`` is ``a`` and nothing else but the width differs."""

    asked = 0

    def identity(self, genome: Mapping[str, Any]) -> str | None:
        type(self).asked += 1
        return str(genome["width"]) if all(genome[f"op{i}"] == "a" for i in range(6)) else None


def test_ends_when_everything_feasible_is_known() -> None:
    study = new_study()
    genomes = search(study, make(space=Picky(LAYERS)), 4)
    assert sorted(genome["width"] for genome in genomes) == [1, 2, 4, 8]
    with pytest.raises(SpaceExhausted, match="4 are known"):
        search(study, make(space=Picky(LAYERS)), 1)


def test_almost_nothing_feasible_ends_after_a_bounded_number_of_tries() -> None:
    class Nothing(GeneSpace):
        tries = 0

        def identity(self, genome: Mapping[str, Any]) -> str | None:
            self.tries += 1
            return None

    wide = {f"gene{i}": tuple(range(10)) for i in range(12)}
    space = Nothing(wide)
    with pytest.raises(SpaceExhausted):
        ask(new_study(), make(space=space, max_tries=100), wide)
    assert space.tries <= 100 + 64


def test_a_space_smaller_than_the_population_is_searched_completely() -> None:
    genes = {"x": (1, 2, 3), "y": ("a", "b")}
    study, sampler = new_study(1), make(space=GeneSpace(genes), population_size=50)
    for _ in range(6):
        trial = ask(study, sampler, genes)
        study.tell(trial, trial.params["x"])
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 6
    with pytest.raises(SpaceExhausted):
        ask(study, sampler, genes)


# Constraints, directions, surrogates


def test_feasible_trials_become_parents_first() -> None:
    study, sampler = new_study(), make(front_parents=1.0, surrogate=False)
    for _ in range(20):
        trial = ask(study, sampler)
        values = objectives(trial.params)
        trial.set_constraint("latency", values[1] - 8.0)
        study.tell(trial, values)
    feasible = {trial.number for trial in study.trials if trial.constraints["latency"] <= 0}
    first = min(feasible)
    late = [sampler.lineage(trial.number)["parent"] for trial in study.trials[max(8, first + 1) :]]
    assert late
    assert set(late) <= feasible


def test_the_surrogate_learns_a_constraint() -> None:
    study, sampler = new_study(), make()
    for _ in range(40):
        trial = ask(study, sampler)
        values = objectives(trial.params)
        trial.set_constraint("latency", values[1] - 8.0)
        study.tell(trial, values)
    broken = [trial.constraints["latency"] > 0 for trial in study.trials]
    assert np.mean(broken[20:]) < np.mean(broken[:8])


def test_maximizing_the_negative_is_minimizing() -> None:
    study = optuna.create_study(directions=["maximize", "maximize"])
    sampler = make()
    for _ in range(20):
        trial = ask(study, sampler)
        trial.set_user_attr("lineage", sampler.lineage(trial.number))
        study.tell(trial, [-value for value in objectives(trial.params)])
    assert [trial.params for trial in study.trials] == search(new_study(), make(), 20)


def test_a_constant_objective_falls_back_to_plain_evolution_and_says_so() -> None:
    study, sampler = new_study(), make()
    for _ in range(12):
        trial = ask(study, sampler)
        study.tell(trial, [1.0, 2.0])
    assert "same for all" in sampler.lineage(11)["surrogate"]
    assert "surrogate" not in sampler.lineage(3)


def test_cheap_objectives_are_asked_for_feasible_candidates_only() -> None:
    asked: list[Mapping[str, Any]] = []

    def cheap(genome: Mapping[str, Any]) -> dict[str, float]:
        asked.append(genome)
        return {"latency": objectives(genome)[1]}

    class NoWidth8(GeneSpace):
        def identity(self, genome: Mapping[str, Any]) -> str | None:
            return None if genome["width"] == 8 else super().identity(genome)

    search(new_study(), make(space=NoWidth8(LAYERS), objectives=NAMES[:2], cheap=cheap), 14)
    assert asked
    assert all(genome["width"] != 8 for genome in asked)


def test_unknown_and_invalid_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="did you mean 'population_size'"):
        make(population_sizes=3)
    with pytest.raises(ValidationError):
        make(front_parents=2.0)


# The paper's mode (Nemotron-Flash, Algorithm 1)

WIDE = {f"factor{i}": ("a", "b", "c", "d") for i in range(6)}
# A complete table: 4,096 architectures, a loss and a latency each.
TABLE = {
    genes: (30.0 - 2.0 * genes.count("d") + noise, 5.0 + 4.0 * genes.count("d") + genes.count("c"))
    for genes, noise in zip(itertools.product(*WIDE.values()), np.random.default_rng(0).normal(size=4**6), strict=True)
}


def look_up(genome: Mapping[str, Any]) -> list[float]:
    return list(TABLE[tuple(genome[name] for name in WIDE)])


def paper(**settings: Any) -> AgingEvolutionSampler:
    given = {"mode": "paper", "population_size": 6, "latency_target": 20.0, "latency_objective": "latency", "seed": 5}
    return AgingEvolutionSampler(GeneSpace(WIDE), objectives=NAMES[:2], **given | settings)


@pytest.mark.parametrize("subset", [6, 3])
def test_algorithm_1_step_by_step_on_a_table(subset: int) -> None:
    study, sampler = new_study(), paper(tournament_size=subset)
    population: deque[tuple[int, list[float]]] = deque(maxlen=6)  # the oldest leaves when one enters
    for step in range(60):
        trial = ask(study, sampler, WIDE)
        lineage = sampler.lineage(trial.number)
        if step < 6:
            assert lineage["kind"] == "random"
        else:
            assert lineage["kind"] == "mutation"
            assert len(lineage["genes"]) == 1
            rng = np.random.default_rng([5, step])
            entrants = [population[i] for i in rng.choice(6, size=subset, replace=False)]
            within = [member for member in entrants if member[1][1] <= 20.0]
            best = min(within, key=lambda m: m[1][0]) if within else min(entrants, key=lambda m: m[1][::-1])
            # A draw that is known already is drawn again, from a new subset; what was drawn first is checked here.
            if not _drawn_again(study, sampler, step, best[0]):
                assert lineage["parent"] == best[0]
            assert lineage["parent"] in [number for number, _ in population]
        values = look_up(trial.params)
        study.tell(trial, values)
        population.append((trial.number, values))


def test_ten_offspring_in_flight_have_parents_from_the_population_only() -> None:
    study, sampler = new_study(), paper()
    running, completed = [ask(study, sampler, WIDE) for _ in range(10)], []
    for _ in range(80):
        trial = running.pop(0)
        study.tell(trial, look_up(trial.params))
        completed.append(trial.number)
        running.append(ask(study, sampler, WIDE))
        assert sum(t.state == TrialState.RUNNING for t in study.trials) == 10
        assert sampler.lineage(running[-1].number)["parent"] in completed[-6:]
    genomes = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(set(genomes)) == len(genomes)


def _drawn_again(study: optuna.Study, sampler: AgingEvolutionSampler, step: int, parent: int) -> bool:
    """Whether the first mutation of ``parent`` in this step gave a known genome."""
    genes = Genes.of(WIDE)
    known = {genes.encode(trial.params) for trial in study.trials[:step]}
    rng = np.random.default_rng([5, step])
    rng.choice(6, size=sampler._settings.tournament_size, replace=False)
    row = np.array([genes.encode(study.trials[parent].params)])
    child = genes.mutate(rng, row, np.array([1]), np.ones(len(WIDE)), near=False)[0]
    return tuple(child.tolist()) in known


def test_width_is_fitted_last_as_the_largest_that_meets_the_target() -> None:
    def cheap(genome: Mapping[str, Any]) -> dict[str, float]:
        return {"latency": objectives(genome)[1]}

    sampler = make(
        mode="paper",
        latency_target=9.0,
        latency_objective="latency",
        fit_width="width",
        objectives=("loss",),
        cheap=cheap,
    )
    for genome in search(new_study(1), sampler, 25, 1):
        fitting = [w for w in LAYERS["width"] if objectives({**genome, "width": w})[1] <= 9.0]
        assert genome["width"] == max(fitting, default=1)


def test_a_target_for_an_unknown_latency_is_refused() -> None:
    with pytest.raises(SettingsError, match="no objective"):
        paper(latency_objective="speed")
    with pytest.raises(SettingsError, match="known beforehand"):
        paper(fit_width="factor0")
