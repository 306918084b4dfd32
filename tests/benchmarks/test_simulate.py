"""The simulated cluster: its clock, its failures, and the shipped loop on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from archsearch.architecture import make_architecture
from archsearch.evaluation import Outcome
from benchmarks import simulate
from tests.search.fakes import FakeEvaluator, make_config

LOAD = simulate.Workload(mean=60.0, sigma=0.5, failures=0.0, restart=0.0, seed=1)
MODEL = make_architecture(hidden_size=64, vocab_size=256, operators="f")


def test_results_come_in_the_order_of_virtual_time() -> None:
    cluster = simulate.VirtualCluster(500, FakeEvaluator(), LOAD)
    for key in range(500):
        cluster.submit(key, MODEL, 0)
    ends, keys = [], []
    while found := cluster.wait(0.5):
        ends.append(cluster.clock)
        keys += [key for key, _ in found]
    assert sorted(keys) == list(range(500))
    assert keys != list(range(500))
    assert ends == sorted(ends)
    # The last of 500 log-normal durations of mean 60 s; the median is exp(-sigma^2 / 2) of the mean.
    assert 100 < ends[-1] < 600
    assert np.median(ends) == pytest.approx(60 * np.exp(-0.125), rel=0.15)


def test_a_failed_worker_is_away_while_it_restarts() -> None:
    cluster = simulate.VirtualCluster(1, FakeEvaluator(), simulate.Workload(60.0, 0.1, 1.0, 1000.0, 0))
    cluster.submit(0, MODEL, 0)
    ((_, evaluation),) = cluster.wait(0.5)
    assert evaluation.outcome in (Outcome.CRASH, Outcome.NODE_LOST)
    assert cluster.capacity == 0
    failed_at = cluster.clock
    assert cluster.wait(0.5) == []
    assert cluster.capacity == 1
    assert cluster.clock == pytest.approx(failed_at + 1000, abs=5)


def test_the_shipped_loop_spends_its_budget_in_spite_of_failures() -> None:
    config = make_config(evaluations=120, sampler="random")
    load = simulate.Workload(60.0, 0.5, 0.1, 10.0, 0)
    result, landscape = simulate.simulate(config, FakeEvaluator(), 16, load)
    assert (result.evaluations, result.reason) == (120, "finished")
    assert result.results > 120
    assert len(landscape.points) >= 115
    assert 0.8 < result.utilisation <= 1.0
    # 120 evaluations of a minute on 16 workers, and the longest of the last.
    assert 400 < result.makespan < 1200


def test_one_worker_is_always_busy() -> None:
    result, _ = simulate.simulate(make_config(evaluations=20, sampler="random"), FakeEvaluator(), 1, LOAD)
    assert result.utilisation > 0.98


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    rows = [
        f"{a},{b},{c},{(a - 3) ** 2 + b + 0.1 * c},{a + 2 * c}" for a in range(8) for b in range(8) for c in range(8)
    ]
    table.write_text("\n".join(["g1,g2,g3,error,cost", *rows]))
    words = [
        "simulate",
        "--workers",
        "8",
        "--evaluations",
        "60",
        "--sampler",
        "random",
        "--json",
        str(tmp_path / "o.json"),
        "--png",
        str(tmp_path / "o.png"),
    ]
    monkeypatch.setattr("sys.argv", [*words, "--table", str(table), "--objectives", "error,cost"])
    assert simulate.main() == 0
    assert "quality" in capsys.readouterr().out
    written = json.loads((tmp_path / "o.json").read_text())["results"][0]
    assert (written["workers"], written["evaluations"]) == (8, 60)
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    # 60 random rows of 512 against the true front.
    assert 0.7 < written["quality"] < 1.0
    monkeypatch.setattr("sys.argv", ["simulate", "--workers", "0"])
    assert simulate.main() == 3
