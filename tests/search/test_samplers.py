"""Samplers by name: what they are built with, and that each proposes in the space without torch in the driver."""

from __future__ import annotations

import subprocess
import sys

import pytest
from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

from archsearch.search.aging import AgingEvolutionSampler
from archsearch.search.executors import InlineExecutor
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.samplers import make_sampler
from tests.search.fakes import SPACE, FakeEvaluator, make_config

KINDS = {
    "aging": AgingEvolutionSampler,
    "tpe": TPESampler,
    "nsga2": NSGAIISampler,
    "gp": GPSampler,
    "random": RandomSampler,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_name_makes_its_sampler(name: str) -> None:
    assert isinstance(make_sampler(make_config(sampler=name))(0, False), KINDS[name])


@pytest.mark.parametrize("name", ["aging", "tpe", "nsga2", "random"])
def test_a_seed_gives_one_sequence_and_another_seed_another(name: str) -> None:
    def genomes(seed: int) -> list[dict[str, object]]:
        config = make_config(sampler=name, evaluations=10, seed=seed)
        ledger = Ledger(config)
        Search(config, ledger, lambda: InlineExecutor(FakeEvaluator())).run()
        assert {trial.user_attrs["lineage"]["kind"] for trial in ledger.trials} != {""}
        return [trial.params for trial in ledger.trials]

    assert genomes(1) == genomes(1)
    assert genomes(1) != genomes(2)


@pytest.mark.parametrize("mode", ["default", "paper"])
def test_objectives_known_beforehand_are_used(mode: str) -> None:
    aging = {"mode": mode, "population_size": 4}
    config = make_config(evaluations=7, aging=aging, objectives=["loss", "parameters", "state_bytes"])
    calls = make_sampler(config)(0, False)
    genome = {name: choices[0] for name, choices in config.space.genes.items()}
    architecture = config.space.build(genome)
    assert isinstance(calls, AgingEvolutionSampler)
    assert calls._cheap is not None
    assert calls._cheap(genome) == {
        "parameters": architecture.parameters,
        "state_bytes": architecture.state_bytes(config.space.limits.state_context),
    }


def test_the_papers_mode_aims_at_the_latency_limit() -> None:
    config = make_config({**SPACE, "limits": {"decode_latency": 0.2}}, evaluations=10)
    ledger = Ledger(config)
    assert Search(config, ledger, lambda: InlineExecutor(FakeEvaluator())).run().progress.done == 10
    assert make_sampler(config)(0, False)._settings.latency_target == 0.2


def test_each_part_of_ageing_evolution_is_a_setting_of_the_run() -> None:
    off = {"design": False, "ordinal": False, "adaptive": False, "surrogate": False, "descriptors": False}
    other = {"unguided": 0.5, "crossover": 0.0, "candidates": 8, "front_parents": 0.0, "max_tries": 9}
    settings = make_sampler(make_config(aging=off | other))(0, False)._settings
    assert {name: getattr(settings, name) for name in off | other} == off | other
    config = make_config(evaluations=12, aging={**off, "population_size": 4})
    ledger = Ledger(config)
    Search(config, ledger, lambda: InlineExecutor(FakeEvaluator())).run()
    kinds = [trial.user_attrs["lineage"]["kind"] for trial in ledger.trials]
    assert "design" not in kinds
    assert "crossover" not in kinds  # which only the surrogates' pool holds


@pytest.mark.parametrize("name", ["aging", "tpe", "nsga2", "random"])
def test_the_driver_never_imports_torch(name: str) -> None:
    code = (
        "import sys\n"
        "from archsearch.search.executors import InlineExecutor\n"
        "from archsearch.search.ledger import Ledger\n"
        "from archsearch.search.loop import Search\n"
        "from tests.search.fakes import FakeEvaluator, make_config\n"
        f"config = make_config(sampler={name!r}, evaluations=8)\n"
        "Search(config, Ledger(config), lambda: InlineExecutor(FakeEvaluator())).run()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
