"""What every executor must do. Subclass ExecutorKit and give it a fixture ``start``."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from archsearch.architecture import Architecture, make_architecture
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.search.executors import Executor, Finished
from archsearch.stopping import Forecast, StoppingRule
from tests.search.fakes import FakeEvaluator, FaultyEvaluator, RungEvaluator, objectives_of

Start = Callable[[Evaluator], Executor]
EVERY_DIGIT = "0123456789abcdef"


def architectures(count: int) -> list[Architecture]:
    """Different small architectures."""
    return [
        make_architecture(hidden_size=64, vocab_size=256 + index, operators=[{"kind": "f", "ratio": 2}])
        for index in range(count)
    ]


def run(executor: Executor, wanted: list[Architecture], seconds: float = 90.0) -> dict[int, Evaluation]:
    """Evaluate them all, as many at a time as fit."""
    waiting, finished = list(enumerate(wanted)), Finished()
    in_flight = 0
    limit = time.monotonic() + seconds
    while len(finished) < len(wanted):
        assert time.monotonic() < limit
        while waiting and in_flight < executor.capacity:
            executor.submit(waiting[0][0], waiting[0][1], 5)
            waiting.pop(0)
            in_flight += 1
        found = executor.wait(1.0)
        in_flight -= len(found)
        finished += found
    assert len({key for key, _ in finished}) == len(finished)
    return dict(finished)


class ExecutorKit:
    """Tests of the Executor protocol."""

    @pytest.fixture
    def start(self) -> Start:
        """Makes an executor around an evaluator."""
        raise NotImplementedError

    def test_each_result_comes_once_under_its_key(self, start: Start) -> None:
        wanted = architectures(6)
        results = run(start(FakeEvaluator()), wanted)
        for key, architecture in enumerate(wanted):
            assert results[key].architecture == architecture
            assert results[key].objectives == objectives_of(architecture)
            assert (results[key].outcome, results[key].seed) == (Outcome.OK, 5)

    def test_the_stopping_rule_travels_with_its_candidate(self, start: Start) -> None:
        forecast = Forecast(weights=(0.0, 1.0, 0.0), width=0.0, inverse=((0.0, 0.0, 0.0),) * 3)
        rule = StoppingRule(objectives=("loss", "decode_latency"), front=((7, (0.0, 0.0)),), forecasts={20: forecast})
        executor = start(RungEvaluator())
        executor.submit(1, architectures(1)[0], 5, rule)
        ((key, found),) = executor.wait(60.0)
        assert (key, found.outcome) == (1, Outcome.STOPPED)
        assert found.verdict is not None
        assert (found.verdict.tokens, found.verdict.dominated_by) == (20, 7)

    def test_nothing_submitted_gives_nothing(self, start: Start) -> None:
        assert start(FakeEvaluator()).wait(0.0) == []

    @pytest.mark.parametrize(
        ("fault", "outcome", "text"),
        [
            ("raise", Outcome.CRASH, "ValueError: broken on purpose"),
            ("system_exit", Outcome.CRASH, "SystemExit"),
            ("memory", Outcome.OOM, "too large"),
            ("oom", Outcome.OOM, "device out of memory"),
            ("nothing", Outcome.CRASH, "NoneType"),
            ("nan", Outcome.NAN, "loss"),
            ("infinite", Outcome.NAN, "decode_latency"),
            ("text", Outcome.CRASH, "loss"),
        ],
    )
    def test_a_fault_is_an_outcome_and_the_next_candidate_is_clean(
        self, start: Start, fault: str, outcome: Outcome, text: str
    ) -> None:
        bad, good = architectures(2)
        results = run(start(FaultyEvaluator(fault, digits=bad.id[0])), [bad, good, bad])
        assert results[1].ok == (good.id[0] != bad.id[0])
        for key in (0, 2):
            assert results[key].outcome is outcome
            assert text in results[key].error
            assert Evaluation.model_validate_json(results[key].model_dump_json()) == results[key]

    def test_close_may_be_called_with_work_in_flight(self, start: Start) -> None:
        executor = start(FakeEvaluator(seconds=0.5))
        executor.submit(0, architectures(1)[0], 0)
        executor.close()
