"""Batches: what is there is never made again, what fails is kept, what is killed goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture
from archsearch.errors import ConfigError, SearchStopped, StorageError, UsageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.batch import Task, read_result, run_batch
from archsearch.search.executors import InlineExecutor
from archsearch.search.folder import RunFolder
from archsearch.search.loop import run_search
from archsearch.search.noise import pooled_noise, ties
from archsearch.search.progress import Progress
from archsearch.search.replicates import read_replicates, replicate_config, replicate_front
from archsearch.search.study import candidates, front, open_study
from tests.search.fakes import RUNGS, FakeEvaluator, FaultyEvaluator, RungEvaluator, make_config

CONFIG = make_config()


def tasks(count: int) -> list[Task]:
    space, found = CONFIG.space, {}
    import numpy as np

    rng = np.random.default_rng(0)
    while len(found) < count:
        architecture = space.build(space.sample(rng))
        found[architecture.id] = architecture
    return [Task(f"{index:03d}-5", architecture, 5) for index, architecture in enumerate(found.values())]


def run(folder: Path, evaluator: Any, count: int = 6, **execution: Any) -> Any:
    config = make_config(None, execution)
    return run_batch(config, tasks(count), folder, lambda: InlineExecutor(evaluator))


def test_a_batch_evaluates_each_task_once(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    assert run(tmp_path / "b", FakeEvaluator(log=log), 4).progress.done == 4
    assert run(tmp_path / "b", FakeEvaluator(log=log), 6).progress.done == 6
    assert sorted(Path(log).read_text().split()) == sorted(task.architecture.id for task in tasks(6))
    for task in tasks(6):
        found = read_result(tmp_path / "b", task.name)
        assert found is not None
        assert (found.architecture, found.seed, found.ok) == (task.architecture, 5, True)


def test_a_whole_batch_needs_no_workers(tmp_path: Path) -> None:
    run(tmp_path, FakeEvaluator())
    summary = run_batch(CONFIG, tasks(6), tmp_path, lambda: pytest.fail("an executor was started"))
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("finished", 0, 6)


def test_failures_are_results_too_and_crashes_get_a_second_try(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    digits = tasks(6)[2].architecture.id[0]
    summary = run(tmp_path / "b", FaultyEvaluator("raise", digits=digits, log=log), failure_rate=1.0)
    broken = [task for task in tasks(6) if task.architecture.id[0] == digits]
    assert (summary.progress.done, summary.progress.failed) == (6, len(broken))
    for task in broken:
        found = read_result(tmp_path / "b", task.name)
        assert found is not None
        assert found.outcome is Outcome.CRASH
        assert Path(log).read_text().split().count(task.architecture.id) == 2


def test_a_breaker_stops_a_batch_that_goes_on_later(tmp_path: Path) -> None:
    with pytest.raises(SearchStopped, match="broken on purpose"):
        run(tmp_path, FaultyEvaluator("raise", digits="0123456789abcdef"), 12)
    left = 12 - len(list(tmp_path.glob("*.json")))
    assert left > 0
    assert run(tmp_path, FakeEvaluator(), 12).progress.done == 12


def test_a_signal_ends_a_batch_after_what_runs(tmp_path: Path) -> None:
    def signalled(architecture: Architecture, *, seed: int) -> Evaluation:
        signal.raise_signal(signal.SIGTERM)
        return FakeEvaluator()(architecture, seed=seed)

    summary = run(tmp_path, signalled)
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("interrupted", 143, 1)
    assert "5 of 6" in summary.message
    assert run(tmp_path, FakeEvaluator()).exit_code == 0


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    run(tmp_path, FakeEvaluator())
    (tmp_path / "003-5.json").write_text("{")
    with pytest.raises(StorageError, match=r"003-5\.json"):
        run(tmp_path, FakeEvaluator())


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[Progress] = []
    run_batch(CONFIG, tasks(3), tmp_path, lambda: InlineExecutor(FakeEvaluator()), on_progress=seen.append)
    assert [p.done for p in seen][-1] == 3
    assert all((p.total, p.front_size) == (3, None) for p in seen)


# Noise


def test_noise_is_pooled_within_architectures() -> None:
    found = pooled_noise([[1.0, 1.2], [5.0, 5.0, 5.3], [9.0]])
    assert found is not None
    assert found.freedom == 3
    assert found.std == pytest.approx(((0.02 + 0.06) / 3) ** 0.5)
    assert found.low < found.std < found.high
    assert pooled_noise([[1.0], [2.0]]) is None


def test_its_interval_holds_the_truth_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    found = [pooled_noise(rng.normal(rng.normal(size=(8, 1)), 0.3, (8, 2)).tolist()) for _ in range(1000)]
    assert np.mean([one.low < 0.3 < one.high for one in found if one]) == pytest.approx(0.95, abs=0.02)


def test_neighbours_within_the_noise_are_tied() -> None:
    noise = pooled_noise([[0.0, 0.1]] * 30)
    assert noise is not None
    step = noise.difference()
    assert ties({1: [2.0], 2: [2.0 + 0.9 * step], 3: [2.0 + 2.5 * step]}, noise) == {1: [2], 2: [1]}
    assert noise.difference(4, 4) == pytest.approx(step / 2)
    assert ties({1: [2.0] * 4, 2: [2.0 + 0.9 * step] * 4}, noise) == {}


# Replicates


def searched(path: Path, evaluator: Any, **options: Any) -> RunFolder:
    folder = RunFolder.create(path, make_config(evaluations=12, **options))
    run_search(folder, evaluator)
    return folder


def seeded(config: Any) -> Any:
    """A loss that the seed moves."""

    def evaluate(architecture: Architecture, *, seed: int) -> Evaluation:
        found = FakeEvaluator()(architecture, seed=seed)
        loss = found.objectives["loss"] + 0.01 * seed
        return found.model_copy(update={"objectives": {"loss": loss}})

    assert config.search.objectives == ("loss",)
    return evaluate


def test_the_front_is_trained_again_outside_of_the_study(tmp_path: Path) -> None:
    folder = searched(tmp_path / "run", RungEvaluator(), proxy=RUNGS)
    before = folder.study_path.read_bytes()
    members = front(candidates(open_study(folder), folder), ("loss", "decode_latency"))
    assert replicate_front(folder, members, 2, seeded).exit_code == 0
    assert folder.study_path.read_bytes() == before
    found = read_replicates(folder)
    assert set(found) == {candidate.number for candidate in members}
    for candidate in members:
        one = found[candidate.number]
        loss = candidate.evaluation.objectives["loss"] if candidate.evaluation else 0.0
        assert one.values("loss") == pytest.approx([loss + 0.01, loss + 0.02])
        assert (one.mean("loss"), one.std("loss")) == pytest.approx((loss + 0.015, 0.01 / 2**0.5))
    times = {path: path.stat().st_mtime_ns for path in (folder.path / "replicates").iterdir()}
    replicate_front(folder, members, 3, seeded)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(read_replicates(folder)[members[0].number].evaluations) == 3


def test_replicates_train_to_the_end_and_measure_nothing_else() -> None:
    config = replicate_config(make_config({**CONFIG.space.model_dump(mode="json")}, proxy=RUNGS))
    assert config.search.objectives == ("loss",)
    assert config.proxy.rungs == ()
    assert config.space.limits.decode_latency is None
    with pytest.raises(ConfigError, match="do not depend on a seed"):
        replicate_config(make_config(objectives=["parameters", "state_bytes"]))


def test_no_replicates_are_a_mistake(tmp_path: Path) -> None:
    folder = searched(tmp_path / "run", FakeEvaluator())
    assert read_replicates(folder) == {}
    with pytest.raises(UsageError, match="--replicates 0"):
        replicate_front(folder, [], 0, seeded)
    (folder.path / "replicates").mkdir()
    (folder.path / "replicates" / "0001-1.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(StorageError, match="0001-1"):
        read_replicates(folder)
