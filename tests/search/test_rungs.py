"""Early stopping in a search: who stops, what becomes of them, and that a cut search ends as a whole one."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from archsearch.errors import SearchStopped
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.executors import InlineExecutor
from archsearch.search.folder import RunFolder
from archsearch.search.genes import Genes
from archsearch.search.guide import Guide
from archsearch.search.history import HistoryReader
from archsearch.search.ledger import Ledger, distributions
from archsearch.search.loop import Search, run_search
from archsearch.search.pareto import front as pareto_front
from archsearch.search.rungs import Rungs, fit_forecast, savings
from archsearch.search.study import Candidate, candidates, front, open_study
from tests.search.fakes import RUNGS, FakeEvaluator, RungEvaluator, make_config, objectives_of
from tests.search.test_resume import Killed, killing, table

STOPPING = {"minimum": 8, "confidence": 0.9}
OBJECTIVES = ("loss", "decode_latency")


def search(path: Path, **options: object) -> RunFolder:
    folder = RunFolder.create(path, make_config(proxy=RUNGS, stopping=STOPPING, **{"evaluations": 40, **options}))
    run_search(folder, RungEvaluator(str(path / "log")))
    return folder


def read(folder: RunFolder) -> list[Candidate]:
    return candidates(open_study(folder), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return search(tmp_path_factory.mktemp("rungs") / "run")


def test_a_forecast_misses_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        early, cost = rng.normal(3, 0.3, 13), rng.normal(1, 0.5, 13)
        last = 0.8 * early - 0.2 * cost + 0.1 + rng.normal(0, 0.05, 13)
        rows = np.column_stack([np.ones(13), early, cost]).tolist()
        found = fit_forecast(rows[:12], last[:12].tolist(), 0.9)
        assert found is not None
        missed += last[12] < found.expected(rows[12]) - found.margin(rows[12])
    assert missed / 2000 == pytest.approx(0.1, abs=0.02)
    known = np.linalg.lstsq(np.array(rows[:12]), last[:12], rcond=None)[0]
    assert found.weights == pytest.approx(known)


def test_sizes_of_any_unit_and_constant_ones_are_taken() -> None:
    rng = np.random.default_rng(0)
    early = rng.normal(3, 0.3, 12)
    last = 0.8 * early + 0.1
    for cost in (np.full(12, 20.0), np.zeros(12), 1e-9 * rng.random(12), 1e9 + 1e8 * rng.random(12)):
        found = fit_forecast(np.column_stack([np.ones(12), early, cost]).tolist(), last.tolist(), 0.9)
        assert found is not None
        assert found.expected([1.0, 3.0, float(cost[0])]) == pytest.approx(2.5, abs=1e-6)


@pytest.mark.parametrize(
    "pairs",
    [[(3.0, 2.0)] * 6, [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (4.0, 0.5)], [(1.0, 1.0), (2.0, 2.0), (3.0, 3.1)]],
    ids=["all equal", "falling", "too few"],
)
def test_losses_that_foretell_nothing_give_no_forecast(pairs: list[tuple[float, float]]) -> None:
    assert fit_forecast([[1.0, early] for early, _ in pairs], [last for _, last in pairs], 0.95) is None


def test_nobody_stops_before_enough_have_ended(folder: RunFolder) -> None:
    found = read(folder)
    stopped = [c.number for c in found if c.outcome is Outcome.STOPPED]
    assert stopped
    assert sum(c.outcome is Outcome.OK for c in found[: min(stopped)]) >= STOPPING["minimum"]


def test_stopped_candidates_are_pruned_trials_and_no_failures(folder: RunFolder) -> None:
    found = read(folder)
    summary = run_search(RunFolder.open(folder.path), FakeEvaluator())
    stopped = [c for c in found if c.outcome is Outcome.STOPPED]
    assert (summary.progress.stopped, summary.progress.failed) == (len(stopped), 0)
    assert summary.progress.done == 40
    for candidate in stopped:
        trial = open_study(folder).trials[candidate.number]
        assert (trial.state, trial.values) == (TrialState.PRUNED, None)
        evaluation = candidate.evaluation
        assert evaluation is not None
        assert evaluation.verdict is not None
        assert evaluation.curve
        assert not evaluation.objectives
        assert trial.user_attrs["expected"] == [
            evaluation.verdict.expected,
            objectives_of(evaluation.architecture)["decode_latency"],
        ]
    assert not {c.number for c in stopped} & {c.number for c in front(found, OBJECTIVES)}
    calls = Counter((folder.path / "log").read_text().split())
    assert set(calls.values()) == {1}


def test_the_stopped_would_have_been_dominated(folder: RunFolder) -> None:
    found = [c for c in read(folder) if c.architecture is not None]
    values = {c.number: objectives_of(c.architecture) for c in found if c.architecture is not None}
    numbers = sorted(values)
    points = [[values[n][name] for name in OBJECTIVES] for n in numbers]
    best = {numbers[index] for index in pareto_front(points)}
    lost = best & {c.number for c in found if c.outcome is Outcome.STOPPED}
    assert len(lost) <= 1
    for candidate in found:
        if candidate.evaluation is not None and (verdict := candidate.evaluation.verdict) is not None:
            rival = values[verdict.dominated_by]
            assert rival["loss"] == verdict.to_beat < verdict.expected
            assert rival["decode_latency"] <= values[candidate.number]["decode_latency"]


def test_samplers_learn_from_the_stopped_but_breed_from_the_others(folder: RunFolder) -> None:
    study = open_study(folder)
    genes = Genes.of({name: kind.choices for name, kind in distributions(folder.config.space).items()})
    history = HistoryReader(lambda genes, codes: repr(codes)).read(study, genes, len(study.trials))
    pruned = {t.number for t in study.trials if t.state == TrialState.PRUNED}
    assert not pruned & set(history.numbers[history.finished])
    assert pruned <= set(history.numbers[history.learned])
    assert np.isfinite(history.values[history.learned]).all()
    assert (history.violations == 0).all()
    gains = Guide(genes).gains(history, history.codes[:4], np.full((4, 2), np.nan))
    assert np.isfinite(gains).all()


def test_rungs_save_tokens(folder: RunFolder) -> None:
    saved = savings(folder.config, read(folder))
    assert saved is not None
    assert sum(saved.stopped.values()) == sum(c.outcome is Outcome.STOPPED for c in read(folder))
    assert saved.without == 40 * 40
    expected = sum(tokens * count for tokens, count in saved.stopped.items())
    assert saved.trained == expected + 40 * sum(c.outcome is Outcome.OK for c in read(folder))
    assert 0 < saved.share < 1
    assert savings(make_config(), []) is None


@pytest.mark.parametrize("sampler", ["aging", "tpe"])
def test_a_search_cut_at_any_step_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    config = make_config(proxy=RUNGS, stopping={"minimum": 6, "confidence": 0.8}, evaluations=24, sampler=sampler)
    whole = RunFolder.create(tmp_path / "whole", config)
    run_search(whole, RungEvaluator())
    assert any(c.outcome is Outcome.STOPPED for c in read(whole))
    cut = RunFolder.create(tmp_path / "cut", config)
    killing(monkeypatch, random.Random(sampler), mean=25)
    for _ in range(100):
        try:
            run_search(cut, RungEvaluator())
            break
        except Killed:
            cut = RunFolder.open(cut.path)
    monkeypatch.undo()
    assert table(cut) == table(whole)


def test_stopped_ones_trip_no_breaker() -> None:
    config = make_config(
        None,
        {"failure_minimum": 2, "failure_rate": 0.1},
        RUNGS,
        evaluations=40,
        stopping={"minimum": 4, "confidence": 0.6},
    )
    search = Search(config, Ledger(config), lambda: InlineExecutor(RungEvaluator()))
    assert search.run().progress.stopped > 4


def test_a_stop_without_a_verdict_is_a_crash() -> None:
    def evaluate(architecture: object, *, seed: int, stopping: object = None) -> Evaluation:
        return Evaluation.model_construct(architecture=architecture, outcome=Outcome.STOPPED)

    config = make_config(evaluations=6)
    with pytest.raises(SearchStopped, match="last one: CRASH"):
        Search(config, Ledger(config), lambda: InlineExecutor(evaluate)).run()


def test_evaluators_without_rungs_are_asked_as_ever() -> None:
    assert Rungs(make_config()).rule() is None
    assert not Rungs(make_config()).on


def test_checkpoints_go_when_their_candidate_is_done(tmp_path: Path) -> None:
    class Leaving(RungEvaluator):
        def __call__(self, architecture: object, **options: object) -> Evaluation:
            (folder.checkpoints / f"{architecture.id}.safetensors").write_text("half")
            (folder.checkpoints / f".{architecture.id}.safetensors.x1").write_text("torn")
            return super().__call__(architecture, **options)

    folder = RunFolder.create(tmp_path / "run", make_config(proxy=RUNGS, evaluations=5))
    run_search(folder, Leaving())
    assert list(folder.checkpoints.iterdir()) == []
