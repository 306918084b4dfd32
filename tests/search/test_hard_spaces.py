"""Searches that cannot go as planned: a space that ends early, hardly anything feasible, nothing to learn."""

from __future__ import annotations

from typing import Any

import pytest

from archsearch.architecture import SPACES, Architecture
from archsearch.config import RunConfig, load_config
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.executors import InlineExecutor
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.progress import Summary
from archsearch.search.study import is_refused
from tests.search.fakes import SPACE, FakeEvaluator, make_config
from tests.search.test_loop import TINY

DEFAULT = {"mode": "default", "population_size": 6}


def search(config: RunConfig, evaluator: Any = None) -> tuple[Summary, Ledger]:
    ledger = Ledger(config)
    return Search(config, ledger, lambda: InlineExecutor(evaluator or FakeEvaluator())).run(), ledger


@pytest.mark.parametrize("mode", ["default", "paper"])
@pytest.mark.parametrize("population", [4, 50])
def test_a_space_smaller_than_budget_and_population_is_searched_whole(mode: str, population: int) -> None:
    summary, _ = search(make_config(TINY, evaluations=40, aging={"mode": mode, "population_size": population}))
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("exhausted", 0, 8)
    assert "no new feasible architecture" in summary.message


@pytest.mark.parametrize("mode", ["default", "paper"])
def test_a_space_in_which_almost_nothing_is_feasible_ends_clearly(mode: str) -> None:
    space = {**SPACE, "limits": {"parameters": {"max": 64_000}}}
    summary, ledger = search(make_config(space, evaluations=100, aging={"mode": mode, "population_size": 4}))
    assert (summary.reason, summary.exit_code) == ("exhausted", 0)
    assert summary.message == f"no new feasible architecture found in 2000 draws; {summary.progress.done} are known"
    assert 0 < summary.progress.done <= 12
    outcomes = [trial.user_attrs["outcome"] for trial in ledger.trials if trial.params]
    assert outcomes == [Outcome.OK] * summary.progress.done


def test_a_sampler_that_learns_nothing_from_refusals_is_brought_on() -> None:
    hybrid = load_config(SPACES / "hybrid.yaml").space.model_copy(update={"seeds": ()})
    config = make_config(hybrid.model_dump(mode="json"), sampler="tpe", evaluations=40)
    summary, ledger = search(config)
    assert (summary.reason, summary.progress.done) == ("finished", 40)
    kinds = [trial.user_attrs["lineage"]["kind"] for trial in ledger.trials]
    assert {"tpe", "random"} == set(kinds)
    refused = [is_refused(trial) for trial in ledger.trials]
    assert all(refused[i - 1] for i, kind in enumerate(kinds) if kind == "random")


def constant(architecture: Architecture, *, seed: int) -> Evaluation:
    """Teaches nothing."""
    objectives = {"loss": 2.0, "decode_latency": 0.5}
    return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=objectives, seed=seed)


def test_where_no_surrogate_can_be_fitted_evolution_goes_on_and_the_trial_says_so() -> None:
    summary, ledger = search(make_config(evaluations=16, aging=DEFAULT), constant)
    assert (summary.reason, summary.progress.done) == ("finished", 16)
    lineages = [trial.user_attrs["lineage"] for trial in ledger.trials]
    assert not any("surrogate" in lineage for lineage in lineages[:6])
    noted = [lineage for lineage in lineages[6:] if "surrogate" in lineage]
    assert noted
    for lineage in noted:
        assert "same for all" in lineage["surrogate"]
        assert lineage["kind"] in ("mutation", "front mutation")
        assert lineage["parent"] is not None
