from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archsearch.config import LatencyConfig
from archsearch.latency import timing
from archsearch.latency.timing import Run, fitted, integrate, interrupted, make_plan, time_strata, undisturbed, warm_up


class Scripted:
    """A runtime that only counts; ``step_seconds`` are what the fake clock shows for each step."""

    path = "scripted"

    def __init__(self) -> None:
        self.token = torch.zeros(1, dtype=torch.int64)
        self.at, self.steps, self.visited = 0, 0, []

    def seek(self, tokens: int) -> None:
        self.at = tokens

    def step(self) -> None:
        self.visited.append(self.at)
        self.at += 1
        self.steps += 1


@given(tokens=st.integers(1, 10_000), strata=st.integers(1, 512), steps=st.integers(1, 300))
def test_plan_stays_inside_the_capacity(tokens: int, strata: int, steps: int) -> None:
    plan = make_plan(LatencyConfig(tokens=tokens, strata=strata, steps=steps))
    assert 1 <= plan.steps <= steps
    assert len(plan.starts) * plan.width == pytest.approx(tokens)
    assert plan.starts[0] >= 0
    assert plan.starts[-1] + plan.steps <= tokens
    assert all(b - a >= plan.steps for a, b in zip(plan.starts, plan.starts[1:], strict=False))


def test_plan_takes_the_middle_of_each_stratum() -> None:
    plan = make_plan(LatencyConfig(tokens=8192, strata=16, steps=64))
    assert plan.middles == tuple(range(256, 8192, 512))


def test_slow_steps_make_a_plan_shorter_around_the_same_middles() -> None:
    plan = make_plan(LatencyConfig(tokens=8192, strata=16, steps=64))
    assert fitted(plan, 1e-3) == plan
    short = fitted(plan, 0.1)
    assert short.steps == int(timing.BUDGET / 3 / 1.6)
    assert short.middles == plan.middles
    assert fitted(plan, 1e3).steps == 1


def test_short_runs_time_every_position() -> None:
    plan = make_plan(LatencyConfig(tokens=32, strata=16, steps=64))
    assert [start + step for start in plan.starts for step in range(plan.steps)] == list(range(32))


def test_midpoints_integrate_a_linear_step_time_exactly() -> None:
    plan = make_plan(LatencyConfig(tokens=1000, strata=10, steps=20))
    seconds, interval = integrate([np.full(5, 1e-3 + 1e-6 * middle) for middle in plan.middles], plan.width)
    assert seconds == pytest.approx(sum(1e-3 + 1e-6 * position for position in range(1000)), rel=1e-3)
    assert interval is not None
    assert interval == pytest.approx((seconds, seconds))


def test_interval_covers_the_median_of_noisy_samples() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        _, interval = integrate([1e-3 * rng.lognormal(0, 0.1, 24) for _ in range(4)], 10.0)
        assert interval is not None
        covered += interval[0] <= 4 * 10e-3 <= interval[1]
    assert covered >= 52


def test_too_few_samples_give_no_interval() -> None:
    seconds, interval = integrate([np.array([1.0, 2.0])], 10.0)
    assert (seconds, interval) == (15.0, None)


def test_interrupted_steps_are_set_aside() -> None:
    runs = [Run([1.0, 9.0, 1.1], [1.0, 0.2, 0.99]), Run([1.2], [1.0])]
    assert undisturbed(runs).tolist() == [1.0, 1.1, 1.2]
    assert interrupted([runs]) == 0.25


def test_where_all_steps_are_interrupted_the_time_of_the_core_counts() -> None:
    assert undisturbed([Run([3.0, 5.0, 4.0], [0.5, 0.5, 1.0])]).tolist() == [1.5, 2.5, 4.0]
    assert undisturbed([Run([3.0, 4.0], [1.0, 1.0])]).tolist() == [3.0, 4.0]


def test_passes_visit_each_stratum_from_its_start() -> None:
    runtime, plan = Scripted(), make_plan(LatencyConfig(tokens=40, strata=2, steps=3))
    runs = time_strata(runtime, plan, repeats=2)
    assert plan.starts == (8, 28)
    assert [len(stratum) for stratum in runs] in ([2, 2], [3, 3], [4, 4], [5, 5], [6, 6])
    # the untimed step, then the timed ones
    assert runtime.visited[:8] == [8, 8, 9, 10, 28, 28, 29, 30]


def test_disturbed_machine_gets_more_passes_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_steps", lambda runtime, start, steps: Run([1.0] * steps, [0.1] * steps))
    plan = make_plan(LatencyConfig(tokens=40, strata=2, steps=3))
    assert len(time_strata(Scripted(), plan, repeats=2)[0]) == 6


def test_spent_budget_ends_after_a_whole_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET", -1.0)
    runs = time_strata(Scripted(), make_plan(LatencyConfig(tokens=40, strata=4, steps=3)), repeats=5)
    assert [len(stratum) for stratum in runs] == [1, 1, 1, 1]


def test_warm_up_waits_for_two_equal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([9.0, 4.0, 2.0, 1.0, 1.01])
    monkeypatch.setattr(timing, "time_steps", lambda runtime, start, steps: Run([next(found)] * 3, [1.0] * 3))
    assert warm_up(Scripted(), make_plan(LatencyConfig(tokens=40)))
    assert next(found, None) is None


def test_warm_up_gives_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = iter(range(1, 10**9))
    clock = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) / 5)
    monkeypatch.setattr(timing, "time_steps", lambda runtime, start, steps: Run([2.0 ** next(growing)] * 3, [1.0] * 3))
    assert not warm_up(Scripted(), make_plan(LatencyConfig(tokens=40)))
