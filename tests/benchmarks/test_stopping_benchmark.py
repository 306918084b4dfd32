"""The benchmark of early stopping: its costs, its rules, and that a budget is kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from archsearch.evaluation import Outcome
from benchmarks import stopping
from benchmarks.tables import load_table


@pytest.fixture
def path(tmp_path: Path) -> str:
    """81 rows: a loss that falls with four genes, a latency that rises with them."""
    rng = np.random.default_rng(0)
    lines = ["a,b,c,d,error,error_early,latency"]
    for genes in itertools.product(range(3), repeat=4):
        error = 10 - sum(genes) + rng.normal(0, 1)
        early = error + 5 + rng.normal(0, 0.1)
        lines.append(",".join(map(str, [*genes, error, early, 1 + sum(genes) + rng.normal(0, 0.5)])))
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize("rule", ["none", "clear 0.8", "quota 2", "bare 0.8", "mute 0.8"])
def test_every_rule_keeps_the_budget(path: str, rule: str) -> None:
    job = stopping.Job(path, ("error", "latency"), (("error_early", 0.1),), 0, rule, seed=1, budget=25.0)
    name, course, stopped, evaluations = job.run()
    assert name == rule
    costs = [cost for cost, _ in course]
    assert costs == sorted(costs)
    assert costs[-1] <= 25 < costs[-1] + 1
    assert (stopped == 0) == (rule == "none")
    assert evaluations == 25 if rule == "none" else evaluations > 25
    covered = [value for _, value in course]
    assert covered == sorted(covered)
    assert 0.5 < covered[-1] <= 1


def test_drawn_curves_cross_and_fall(path: str) -> None:
    table = load_table(path, ("error", "latency"))
    first, second = stopping.drawn_curves(table, 1).values()
    assert first.mean() > second.mean() > table.values[:, 0].mean()
    assert np.corrcoef(first, table.values[:, 0])[0, 1] < np.corrcoef(second, table.values[:, 0])[0, 1] < 1


def test_a_quota_stops_the_worst_by_rank(path: str) -> None:
    records = {10: [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]}
    rule = stopping.QuotaRule(2, records, stopping.StoppingRule(objectives=("loss", "decode_latency")))
    assert rule.verdict(10, {"loss": 0.5, "decode_latency": 0.5}) is None
    assert rule.verdict(10, {"loss": 4.0, "decode_latency": 4.0}) is not None
    assert rule.verdict(20, {"loss": 4.0, "decode_latency": 4.0}) is None
    assert Outcome.STOPPED.max_attempts == 1
