"""HistoryReader: whatever it has read before, it reads what a new one reads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from archsearch.search.aging import AgingEvolutionSampler, GeneSpace
from archsearch.search.genes import Genes
from archsearch.search.history import EXPECTED, LINEAGE, History, HistoryReader
from archsearch.search.pareto import front

CHOICES = {"op": ("a", "d", "f"), "width": (1, 2, 4, 8)}
GENES = Genes.of(CHOICES)
EVERYTHING = 10**9


def identify(genes: Genes, codes: tuple[int, ...]) -> str | None:
    return None if codes[0] == 2 else f"op {codes[0]}"


def new_study(*directions: str, **options: Any) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(directions=directions or ("minimize", "maximize"), sampler=sampler, **options)


def ask(study: optuna.Study, names: tuple[str, ...] = ("op", "width")) -> optuna.Trial:
    return study.ask({name: CategoricalDistribution(CHOICES[name]) for name in names})


def check(reader: HistoryReader, study: optuna.Study, before: int = EVERYTHING) -> History:
    """Read by one that has read before, and by a new one."""
    found, expected = reader.read(study, GENES, before), HistoryReader(identify).read(study, GENES, before)
    for name in set(History.__slots__) - {"source"}:
        np.testing.assert_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    best = found.finished[found.violations[found.finished] == found.violations[found.finished].min(initial=np.inf)]
    assert found.front.tolist() == best[front(found.values[best])].tolist()
    return found


def test_a_history_holds_what_the_study_holds() -> None:
    study = new_study()
    kept, failed, infinite, running, partial, child = [ask(study) for _ in range(4)] + [ask(study, ("op",)), ask(study)]
    child.set_user_attr(LINEAGE, {"parent": kept.number})
    study.tell(failed, state=TrialState.FAIL)
    study.tell(infinite, [float("inf"), 1.0])
    child.set_constraint("memory", 2.0)
    study.tell(child, [1.0, 2.0])
    study.tell(kept, [3.0, 4.0])
    history = check(HistoryReader(identify), study)
    assert history.numbers.tolist() == [0, 1, 2, 3, 5]
    assert partial.number not in history.numbers
    assert history.finished.tolist() == [4, 0]
    assert history.parents.tolist() == [-1, -1, -1, -1, 0]
    assert history.running.tolist() == [False, False, False, True, False]
    np.testing.assert_array_equal(history.values[[0, 4]], [[3.0, -4.0], [1.0, -2.0]])
    assert history.violations.tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]
    assert GENES.decode(history.codes[3]) == running.params
    assert history.genomes == set(map(tuple, history.codes.tolist()))
    assert history.identities == {identify(GENES, codes) for codes in history.genomes}


@pytest.mark.filterwarnings("ignore:The constraint value is ignored")
@pytest.mark.parametrize("seed", range(4))
def test_reading_in_steps_equals_reading_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    study, reader = new_study(), HistoryReader(identify)
    running: list[optuna.Trial] = []

    def propose() -> None:
        running.append(ask(study, ("op",) if rng.random() < 0.1 else ("op", "width")))

    def describe() -> None:
        trial = running[int(rng.integers(len(running)))]
        trial.set_user_attr(LINEAGE, {"parent": int(rng.integers(trial.number + 1))})
        trial.set_constraint(f"limit {rng.integers(3)}", float(rng.normal()))

    def complete() -> None:
        # The gene that a killed or concurrent ask left out.
        running[int(rng.integers(len(running)))].suggest_categorical("width", CHOICES["width"])

    def end() -> None:
        trial = running.pop(int(rng.integers(len(running))))
        if rng.random() < 0.3:
            if rng.random() < 0.5:
                trial.set_user_attr(EXPECTED, [float(rng.normal()), 1.0])
            study.tell(trial, state=TrialState.FAIL if rng.random() < 0.5 else TrialState.PRUNED)
        else:
            study.tell(trial, [float(rng.normal()), float("inf") if rng.random() < 0.2 else 1.0])

    steps: list[Callable[[], None]] = [propose, propose, describe, complete, end]
    for _ in range(150):
        step = steps[int(rng.integers(len(steps)))] if running else propose
        step()
        if rng.random() < 0.4:
            check(reader, study)
    assert len(check(reader, study).numbers) > 16
    check(reader, study, before=7)
    check(reader, study)


def test_a_stopped_trial_teaches_but_is_no_parent() -> None:
    study = new_study()
    stopped, unknown, whole = [ask(study) for _ in range(3)]
    stopped.set_user_attr(EXPECTED, [5.0, 6.0])
    study.tell(stopped, state=TrialState.PRUNED)
    study.tell(unknown, state=TrialState.PRUNED)
    study.tell(whole, [1.0, 2.0])
    history = check(HistoryReader(identify), study)
    assert (history.finished.tolist(), history.learned.tolist()) == ([2], [0, 2])
    np.testing.assert_array_equal(history.values, [[5.0, -6.0], [np.nan, np.nan], [1.0, -2.0]])


def test_the_columns_grow() -> None:
    study, reader = new_study(), HistoryReader(identify)
    for count in range(1, 200):
        study.tell(ask(study), [float(count), 1.0])
        if count % 23 == 0:
            assert check(reader, study).finished.tolist() == list(range(count))


def test_another_study_is_read_from_the_start() -> None:
    reader = HistoryReader(identify)
    finished, flying, maximised = new_study(), new_study(), new_study("maximize", "maximize")
    for _ in range(5):
        study = finished
        study.tell(ask(study), [1.0, 2.0])
    for _ in range(6):
        ask(flying)
        maximised.tell(ask(maximised), [3.0, 4.0])
    for study in (finished, flying, maximised, finished, maximised, flying):
        check(reader, study)


def test_a_study_that_is_loaded_again_is_read_alike() -> None:
    storage = optuna.storages.InMemoryStorage()
    study, reader = new_study(storage=storage, study_name="one"), HistoryReader(identify)
    for _ in range(5):
        study.tell(ask(study), [1.0, 2.0])
        check(reader, study)
    ask(study)
    again = optuna.load_study(study_name="one", storage=storage)
    check(reader, again)
    study.tell(5, [0.0, 0.0])
    assert check(reader, again).finished.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_sampler_travels_to_another_process() -> None:
    study, sampler = new_study(), AgingEvolutionSampler(GeneSpace(CHOICES), seed=1, population_size=3)
    study.sampler = sampler
    study.tell(ask(study), [1.0, 2.0])
    study.sampler = pickle.loads(pickle.dumps(sampler))
    study.tell(ask(study), [1.0, 3.0])
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 2
