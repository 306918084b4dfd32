"""Kill a search at any moment and resume it: the same trials with one worker, nothing lost with several."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from archsearch.errors import RunInUse
from archsearch.evaluation import Outcome
from archsearch.search.folder import RunFolder
from archsearch.search.ledger import Ledger
from archsearch.search.loop import run_search
from archsearch.search.samplers import make_sampler
from archsearch.search.study import candidates, open_study
from tests.search.fakes import FakeEvaluator, FaultyEvaluator, make_config
from tests.search.search_process import start

Row = tuple[Any, ...]


def table(folder: RunFolder) -> list[Row]:
    """What must be equal: everything but times and the number of attempts."""
    study = open_study(folder)
    rows = []
    for trial, candidate in zip(study.trials, candidates(study, folder), strict=True):
        evaluation = candidate.evaluation.model_dump(exclude={"attempts"}) if candidate.evaluation else None
        rows.append((trial.number, trial.state, trial.params, trial.values, candidate.lineage, evaluation))
    return rows


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of ours catches it."""


def killing(monkeypatch: pytest.MonkeyPatch, rng: random.Random, mean: float) -> None:
    """Let every step that touches the disk be the last one, before or after it, once in ``mean`` steps."""

    def mortal(original: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            if rng.random() < 0.5 / mean:
                raise Killed
            result = original(*arguments, **options)
            if rng.random() < 0.5 / mean:
                raise Killed
            return result

        return step

    for owner, name in ((Ledger, "propose"), (Ledger, "_save"), (Ledger, "keep"), (Ledger, "set_attribute")):
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))
    monkeypatch.setattr(FakeEvaluator, "__call__", mortal(FakeEvaluator.__call__))


@pytest.mark.parametrize("sampler", ["aging", "paper", "tpe", "nsga2", "random"])
def test_a_search_cut_at_any_step_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    if sampler == "aging":
        config = make_config(evaluations=12, aging={"population_size": 5})
    else:
        config = make_config(evaluations=14, sampler="aging" if sampler == "paper" else sampler)
    whole = RunFolder.create(tmp_path / "whole", config)
    run_search(whole, FakeEvaluator())
    cut = RunFolder.create(tmp_path / "cut", config)
    killing(monkeypatch, random.Random(sampler), mean=25)
    for _ in range(100):
        try:
            run_search(cut, FakeEvaluator())
            break
        except Killed:
            cut = RunFolder.open(cut.path)
    monkeypatch.undo()
    assert table(cut) == table(whole)
    assert open_study(cut).user_attrs == open_study(whole).user_attrs


def test_twenty_searches_killed_at_random_moments_equal_the_whole_one(tmp_path: Path) -> None:
    config = make_config(evaluations=12, aging={"population_size": 4, "mode": "paper"})
    whole = RunFolder.create(tmp_path / "whole", config)
    run_search(whole, FakeEvaluator())
    expected = table(whole)
    rng = random.Random(0)
    for run in range(20):
        side = tmp_path / str(run)
        side.mkdir()
        folder = RunFolder.create(side / "run", config)
        with folder.lock():
            pass
        _kill_once(folder.path, side, rng)
        assert run_search(RunFolder.open(folder.path), FakeEvaluator(0.0, str(side / "log"))).exit_code == 0
        assert table(folder) == expected
        calls = Counter((side / "log").read_text().split())
        assert set(calls.values()) <= {1, 2}
        assert sum(calls.values()) <= 12 + 1
        _check_nothing_lost(folder, side)


def _kill_once(folder: Path, side: Path, rng: random.Random) -> None:
    """Kill a search of some tenths of a second at a moment between its first evaluation and its end."""
    process = start(folder, side, 0.01)
    while not (side / "log").exists():
        assert process.is_alive()
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.5))
    process.kill()
    process.join()


def _check_nothing_lost(folder: RunFolder, side: Path) -> None:
    """Every acknowledged result is in the study, once, complete and sound."""
    acknowledged = side / "acknowledged"
    lines = acknowledged.read_text().split("\n")[:-1] if acknowledged.exists() else []
    assert len(lines) == len(set(lines))
    found = candidates(open_study(folder), folder)
    stored = {f"{c.number} {c.architecture.id}" for c in found if c.outcome is Outcome.OK and c.architecture}
    assert set(lines) <= stored
    identities = [c.architecture.id for c in found if c.is_distinct and c.architecture]
    assert len(identities) == len(set(identities))
    with sqlite3.connect(folder.study_path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_four_workers_killed_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    execution = {"executor": "ray", "workers": 4, "device": "cpu"}
    folder = RunFolder.create(tmp_path / "run", make_config(None, execution, evaluations=48))
    with folder.lock():
        pass
    kills = 2
    for _ in range(kills):
        before = _lines(tmp_path / "log")
        process = start(folder.path, tmp_path, 0.1)
        limit = time.monotonic() + 120
        while _lines(tmp_path / "log") < before + 12:
            assert process.is_alive()
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.kill()
        process.join()
        # Workers outlive their driver for a moment; what they still log was in flight.
        time.sleep(2.0)
    final = start(folder.path, tmp_path, 0.0)
    final.join(120)
    assert final.exitcode == 0
    found = candidates(open_study(folder), folder)
    assert sum(c.is_distinct for c in found) == 48
    assert all(c.outcome is Outcome.OK for c in found)
    _check_nothing_lost(folder, tmp_path)
    calls = Counter((tmp_path / "log").read_text().split())
    assert sum(calls.values()) - 48 <= 4 * kills


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_result_on_disk_is_told_without_running_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=6))
    ledger = Ledger(folder.config, folder)
    trial = ledger.propose(make_sampler(folder.config)(0, False))
    architecture = folder.config.space.build(trial.params)
    attributes = {"architecture": architecture.id, "notation": architecture.notation, "lineage": {}, "attempts": 1}
    ledger.enter(trial.number, attributes)
    ledger.keep(trial.number, FakeEvaluator()(architecture, seed=0))
    ledger.close()
    log = tmp_path / "log"
    run_search(folder, FakeEvaluator(0.0, str(log)))
    assert architecture.id not in log.read_text().split()
    assert [c.outcome for c in candidates(open_study(folder), folder)] == [Outcome.OK] * 6


def test_a_trial_without_a_whole_genome_is_cancelled(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=6))
    ledger = Ledger(folder.config, folder)
    ledger.close()
    with sqlite3.connect(folder.study_path) as connection:
        for state in ("RUNNING", "WAITING"):
            connection.execute(
                "INSERT INTO trials (number, study_id, state) SELECT COUNT(*), 1, ? FROM trials", (state,)
            )
    connection.close()
    summary = run_search(folder, FakeEvaluator())
    found = candidates(open_study(folder), folder)
    assert summary.progress.done == 6
    assert [c.outcome for c in found] == [Outcome.CANCELLED] * 2 + [Outcome.OK] * 6
    assert [t.state for t in open_study(folder).trials[:2]] == [TrialState.FAIL] * 2


def test_a_moved_run_resumes(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=8))
    with pytest.raises(_Stop):
        run_search(folder, _stop_at(4))
    shutil.move(folder.path, tmp_path / "elsewhere {x} %41?")
    moved = RunFolder.open(tmp_path / "elsewhere {x} %41?")
    assert run_search(moved, FakeEvaluator()).progress.done == 8


class _Stop(BaseException):
    pass


def _stop_at(count: int) -> Any:
    calls: list[str] = []

    def evaluate(architecture: Any, *, seed: int) -> Any:
        calls.append(architecture.id)
        if len(calls) > count:
            raise _Stop
        return FakeEvaluator()(architecture, seed=seed)

    return evaluate


def test_crashes_before_a_kill_do_not_change_the_outcome(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=12))
    evaluator = FaultyEvaluator("raise", digits="012")
    run_search(folder, evaluator)
    other = RunFolder.create(tmp_path / "other", make_config(evaluations=5))
    run_search(other, evaluator)
    make_config(evaluations=12).save(other.config_path)
    run_search(RunFolder.open(other.path), evaluator)
    assert [row[:4] for row in table(other)] == [row[:4] for row in table(folder)]


def test_of_two_that_start_at_once_one_proceeds(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=12))
    with folder.lock():
        pass
    processes = [start(folder.path, tmp_path, 0.2) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 75, 75]
    assert len((tmp_path / "log").read_text().split()) == 12


def test_of_two_that_create_at_once_one_proceeds(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run", make_config())
    with pytest.raises(RunInUse, match=str(os.getpid())):
        RunFolder.create(tmp_path / "run", make_config())
    with first.lock():
        assert run_search(first, FakeEvaluator()).progress.done == 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_process_ends_with_its_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config(evaluations=500))
    with folder.lock():
        pass
    assert _interrupted(folder, tmp_path, 0.05, number, after="acknowledged") == code


def test_workers_that_outlast_the_grace_do_not_change_the_code(tmp_path: Path) -> None:
    execution = {"executor": "ray", "workers": 2, "device": "cpu", "grace": 0.2}
    folder = RunFolder.create(tmp_path / "run", make_config(None, execution, evaluations=500))
    with folder.lock():
        pass
    assert _interrupted(folder, tmp_path, 60.0, signal.SIGINT, after="log") == 130
    assert [c.outcome for c in candidates(open_study(folder), folder)] == [None, None]


def _interrupted(folder: RunFolder, side: Path, seconds: float, number: signal.Signals, *, after: str) -> int | None:
    """The exit code of a search that gets a signal once two lines are in its log ``after``."""
    process = start(folder.path, side, seconds)
    while _lines(side / after) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join(60)
    _check_nothing_lost(folder, side)
    return process.exitcode
