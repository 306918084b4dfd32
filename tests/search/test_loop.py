"""The loop: budget, outcomes, duplicates, breakers, signals, weights. All inline, so all in milliseconds."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.errors import SearchStopped, StorageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search import breaker
from archsearch.search.executors import Finished, InlineExecutor, failed
from archsearch.search.folder import RunFolder
from archsearch.search.ledger import Ledger
from archsearch.search.loop import MAX_REJECTED, Search, run_search
from archsearch.search.progress import Progress, Summary
from archsearch.search.study import Candidate, candidates, front, open_study
from tests.search.fakes import SPACE, FakeEvaluator, FaultyEvaluator, make_config

OBJECTIVES = ("loss", "decode_latency")
TINY: dict[str, Any] = {
    **SPACE,
    "hidden_size": [64, 96],
    "stages": [{"name": "only", "mixers": ["a", "d"], "ratio": ["1:1", "1:2"], "ffns": 1, "blocks": [1, 2]}],
    "options": {"a": {"head_dim": 32}, "d": {"head_dim": 32}},
}
"""16 genomes, 8 architectures: one kind alone has no ratio."""


def read(folder: RunFolder) -> list[Candidate]:
    return candidates(open_study(folder), folder)


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., RunFolder]:
    return lambda *arguments, **search: RunFolder.create(tmp_path / "run", make_config(*arguments, **search))


def test_the_budget_counts_distinct_architectures(create: Callable[..., RunFolder]) -> None:
    folder = create(sampler="tpe", evaluations=25)
    summary = run_search(folder, FakeEvaluator())
    found = read(folder)
    distinct = [c for c in found if c.is_distinct]
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("finished", 0, 25)
    assert len(distinct) == len({c.architecture.id for c in distinct if c.architecture}) == 25


def test_a_duplicate_shares_the_result_and_costs_nothing(create: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = create(TINY, sampler="random", evaluations=8)
    run_search(folder, FaultyEvaluator("nan", digits="01234", log=str(tmp_path / "log")))
    found = read(folder)
    assert len((tmp_path / "log").read_text().split()) == 8
    copies = [c for c in found if c.duplicate_of is not None]
    assert copies
    for copy in copies:
        original = found[copy.duplicate_of or 0]
        assert original.duplicate_of is None
        assert (copy.outcome, copy.evaluation) == (original.outcome, original.evaluation)
        assert open_study(folder).trials[copy.number].values == open_study(folder).trials[original.number].values
    assert not any(c.duplicate_of for c in front(found, OBJECTIVES))


@pytest.mark.parametrize("sampler", ["aging", "random"])
def test_an_exhausted_space_ends_the_search_with_a_reason(create: Callable[..., RunFolder], sampler: str) -> None:
    folder = create(TINY, sampler=sampler, evaluations=50)
    summary = run_search(folder, FakeEvaluator())
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("exhausted", 0, 8)
    assert ("new" in summary.message, "\n" in summary.message) == (True, False)
    assert len(read(folder)) <= 8 + 8 * MAX_REJECTED


def test_infeasible_proposals_are_told_at_once_and_bounded(create: Callable[..., RunFolder], tmp_path: Path) -> None:
    space = {**SPACE, "limits": {"operators": {"min": 8}}}
    folder = create(space, sampler="random", evaluations=10)
    run_search(folder, FakeEvaluator(log=str(tmp_path / "log")))
    outcomes = Counter(c.outcome for c in read(folder))
    assert outcomes[Outcome.OK] == 10 == len((tmp_path / "log").read_text().split())
    assert outcomes[Outcome.INFEASIBLE] > 0
    infeasible = next(c for c in read(folder) if c.outcome is Outcome.INFEASIBLE)
    assert (infeasible.architecture, infeasible.evaluation, infeasible.is_distinct) == (None, None, False)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("nan", Outcome.NAN),
        ("infinite", Outcome.NAN),
        ("missing", Outcome.INVALID_MEASUREMENT),
        ("nothing", Outcome.CRASH),
        ("text", Outcome.CRASH),
        ("raise", Outcome.CRASH),
        ("memory", Outcome.OOM),
        ("oom", Outcome.OOM),
    ],
)
def test_no_failure_gets_objectives_or_onto_the_front(
    create: Callable[..., RunFolder], tmp_path: Path, fault: str, outcome: Outcome
) -> None:
    folder = create(evaluations=12)
    summary = run_search(folder, FaultyEvaluator(fault, digits="0123", log=str(tmp_path / "log")))
    found = read(folder)
    bad = [c for c in found if c.architecture and c.architecture.id[0] in "0123"]
    assert bad
    assert {c.outcome for c in bad} == {outcome}
    assert summary.progress.failed == len(bad)
    assert all(c.evaluation and not c.evaluation.ok and not c.evaluation.objectives for c in bad)
    assert not {c.number for c in bad} & {c.number for c in front(found, OBJECTIVES)}
    attempts = 2 if outcome is Outcome.CRASH else 1
    assert {(c.attempts, c.evaluation.attempts) for c in bad if c.evaluation} == {(attempts, attempts)}
    calls = Counter((tmp_path / "log").read_text().split())
    assert {calls[c.architecture.id] for c in bad if c.architecture} == {attempts}


def test_a_search_in_which_all_fails_stops_soon_and_goes_on_when_mended(create: Callable[..., RunFolder]) -> None:
    folder = create(evaluations=12)
    with pytest.raises(SearchStopped, match="broken on purpose") as error:
        run_search(folder, FaultyEvaluator("raise", digits="0123456789abcdef"))
    assert error.value.exit_code == 5
    assert len(read(folder)) == 5
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == 12


def test_half_of_the_candidates_may_fail(create: Callable[..., RunFolder]) -> None:
    config = make_config(evaluations=20)
    results = iter([True, False] * 10)
    search = Search(config, Ledger(config), lambda: InlineExecutor(_Alternating(results)))
    assert search.run().progress.failed == 10


@dataclass(frozen=True)
class _Alternating:
    good: Any

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        if next(self.good):
            return FakeEvaluator()(architecture, seed=seed)
        return failed(architecture, Outcome.NAN, "nan")


def test_a_full_disk_stops_the_search_before_the_next_candidate(
    create: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([10**9] * 4)
    monkeypatch.setattr(breaker, "free_bytes", lambda path: next(free, 10))
    folder = create(None, {"min_free_bytes": 1000, "grace": 0.1}, evaluations=12)
    with pytest.raises(StorageError, match="free") as error:
        run_search(folder, FakeEvaluator())
    assert error.value.exit_code == 6
    assert [c.outcome for c in read(folder)] == [Outcome.OK] * 4
    monkeypatch.undo()
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == 12


def test_a_full_disk_in_a_commit_is_a_storage_error(
    create: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(evaluations=6)
    write = RunFolder.write_evaluation

    def full(self: RunFolder, number: int, evaluation: Evaluation) -> None:
        if number == 3:
            raise StorageError("cannot write: No space left on device", "free space")
        write(self, number, evaluation)

    monkeypatch.setattr(RunFolder, "write_evaluation", full)
    with pytest.raises(StorageError, match="No space"):
        run_search(folder, FakeEvaluator())
    monkeypatch.undo()
    assert [c.outcome for c in read(folder)] == [Outcome.OK] * 3 + [None]
    run_search(RunFolder.open(folder.path), FakeEvaluator())
    assert [c.outcome for c in read(folder)] == [Outcome.OK] * 6


class Losing:
    """An executor whose node is lost with every second job, and that has two jobs in flight."""

    capacity = 2
    interruptible = True

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.jobs: list[tuple[int, Architecture, int]] = []

    def submit(self, key: int, architecture: Architecture, seed: int, stopping: object = None) -> None:
        self.jobs.append((key, architecture, seed))

    def wait(self, timeout: float | None = None) -> Finished:
        key, architecture, seed = self.jobs.pop()
        if self.losses:
            self.losses -= 1
            return [(key, failed(architecture, Outcome.NODE_LOST, "the node died", seed=seed))]
        return [(key, FakeEvaluator()(architecture, seed=seed))]

    def close(self) -> None:
        self.jobs.clear()


def test_what_a_lost_node_took_is_run_again() -> None:
    config = make_config(evaluations=10)
    ledger = Ledger(config)
    summary = Search(config, ledger, lambda: Losing(3)).run()
    assert (summary.progress.done, summary.progress.failed) == (10, 0)
    assert sorted(t.user_attrs["attempts"] for t in ledger.trials) == [1] * 9 + [4]


def test_nodes_that_go_on_being_lost_stop_the_search_and_fail_no_candidate() -> None:
    config = make_config(evaluations=10, execution={"grace": 0})
    ledger = Ledger(config)
    with pytest.raises(SearchStopped, match="NODE_LOST"):
        Search(config, ledger, lambda: Losing(1000)).run()
    assert not any(trial.state.is_finished() for trial in ledger.trials)


def test_progress_counts_up_and_ends_at_the_budget(create: Callable[..., RunFolder]) -> None:
    seen: list[Progress] = []
    run_search(create(evaluations=12), FaultyEvaluator("nan", digits="01"), on_progress=seen.append)
    assert [p.done for p in seen] == list(range(13))
    assert (seen[0].latest, seen[0].best_loss, seen[0].hypervolume, seen[0].seconds_left) == (None, None, None, None)
    assert [p.latest for p in seen[1:]] == list(range(12))
    assert all(p.running == 1 for p in seen[1:-1])
    assert (seen[-1].running, seen[-1].total, seen[-1].seconds_left) == (0, 12, 0.0)
    volumes = [p.hypervolume for p in seen if p.hypervolume is not None]
    assert len(volumes) == 7
    assert volumes == sorted(volumes)


def test_a_finished_run_is_left_alone(create: Callable[..., RunFolder]) -> None:
    folder = create(evaluations=8)
    run_search(folder, FakeEvaluator())
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path.name != "run.lock"}
    for _ in range(3):
        summary = run_search(RunFolder.open(folder.path), FaultyEvaluator("raise", digits="0123456789abcdef"))
        assert (summary.reason, summary.progress.done) == ("finished", 8)
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_a_search_without_gain_stops(create: Callable[..., RunFolder]) -> None:
    folder = create(evaluations=200, stop_after=6, stop_epsilon=0.5)
    summary = run_search(folder, FakeEvaluator())
    assert (summary.reason, summary.exit_code) == ("stalled", 0)
    assert summary.progress.done < 60
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == summary.progress.done


@dataclass(frozen=True)
class Weighty:
    """Writes a file of weights for each candidate, as proxy training does."""

    weights: str

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        (Path(self.weights) / f"{architecture.id}.safetensors").write_bytes(b"weights")
        return FaultyEvaluator("nan", digits="01")(architecture, seed=seed)


def test_only_the_front_keeps_its_weights(create: Callable[..., RunFolder]) -> None:
    folder = create(evaluations=15)
    run_search(folder, Weighty(str(folder.weights)))
    kept = {path.stem for path in folder.weights.iterdir()}
    assert kept == {c.architecture.id for c in front(read(folder), OBJECTIVES) if c.architecture}


# Signals


@dataclass(frozen=True)
class Signalling:
    """Sends this process a signal during the fourth evaluation, and a second one if ``twice``."""

    number: signal.Signals
    seconds: float = 0.0
    twice: bool = False
    calls: Any = None

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        self.calls.append(architecture.id)
        if len(self.calls) == 4:
            signal.raise_signal(self.number)
            if self.twice:
                main = threading.main_thread().ident
                threading.Timer(0.1, lambda: signal.pthread_kill(main or 0, self.number)).start()
            time.sleep(self.seconds)
        return FakeEvaluator()(architecture, seed=seed)


def interrupt(folder: RunFolder, evaluator: Signalling) -> tuple[Summary, float]:
    begin = time.monotonic()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
    summary = run_search(folder, evaluator)
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
    assert after == handlers
    return summary, time.monotonic() - begin


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)], ids=lambda v: str(v)
)
def test_a_signal_lets_what_runs_end(create: Callable[..., RunFolder], number: signal.Signals, code: int) -> None:
    folder = create(evaluations=10)
    summary, _ = interrupt(folder, Signalling(number, calls=[]))
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("interrupted", code, 4)
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == 10


@pytest.mark.parametrize(("grace", "twice"), [(0.3, False), (60.0, True)], ids=["grace over", "second signal"])
def test_what_does_not_end_in_time_stays_in_flight(create: Callable[..., RunFolder], grace: float, twice: bool) -> None:
    folder = create(None, {"grace": grace}, evaluations=10)
    evaluator = Signalling(signal.SIGTERM, seconds=30.0, twice=twice, calls=[])
    summary, seconds = interrupt(folder, evaluator)
    assert (summary.reason, summary.exit_code, summary.progress.done) == ("interrupted", 143, 3)
    assert seconds < 15
    assert [c.outcome for c in read(folder)] == [Outcome.OK] * 3 + [None]
    assert run_search(RunFolder.open(folder.path), FakeEvaluator()).progress.done == 10
    assert [c.outcome for c in read(folder)] == [Outcome.OK] * 10
    assert read(folder)[3].attempts == 2


def test_the_last_result_makes_an_interrupted_search_a_finished_one(create: Callable[..., RunFolder]) -> None:
    summary, _ = interrupt(create(evaluations=4), Signalling(signal.SIGINT, calls=[]))
    assert (summary.reason, summary.exit_code) == ("finished", 0)


def test_a_search_runs_in_a_thread(create: Callable[..., RunFolder]) -> None:
    summaries: list[Summary] = []
    folder = create(evaluations=4)
    thread = threading.Thread(target=lambda: summaries.append(run_search(folder, FakeEvaluator())))
    thread.start()
    thread.join(60)
    assert summaries[0].progress.done == 4


def test_a_study_in_memory_needs_no_folder() -> None:
    config: RunConfig = make_config(evaluations=12)
    ledger = Ledger(config)
    assert Search(config, ledger, lambda: InlineExecutor(FakeEvaluator())).run().progress.done == 12
    assert len(ledger.trials) == 12
