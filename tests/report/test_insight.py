"""What a search's history says: gains, stalls, earnings and importances, against cases worked by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from archsearch.config import SearchConfig
from archsearch.evaluation import Evaluation, Outcome
from archsearch.report import insight
from archsearch.search.importance import gene_importances
from archsearch.search.progress import Standing
from archsearch.search.study import Candidate
from archsearch.space import SearchSpace

SPACE = SearchSpace.model_validate(
    {
        "hidden_size": [64, 96, 128, 160],
        "vocab_size": 256,
        "stages": [{"name": "only", "pattern": ["a f", "d f", "m2 f"], "blocks": {"min": 1, "max": 4}}],
        "options": {"a": {"head_dim": 32}, "d": {"head_dim": 32}, "m2": {"head_dim": 32, "state": [16, 32]}},
    }
)
NAMES = ("loss", "decode_latency")
BEGIN = datetime(2026, 1, 1)


def make_candidate(
    number: int,
    values: tuple[float, float] | None,
    *,
    lineage: dict[str, Any] | None = None,
    genome: dict[str, Any] | None = None,
    after: float | None = None,
    duplicate_of: int | None = None,
) -> Candidate:
    genome = genome or SPACE.sample(np.random.default_rng(number))
    architecture = SPACE.build(genome)
    outcome = Outcome.NAN if values is None else Outcome.OK
    objectives = {} if values is None else dict(zip(NAMES, values, strict=True))
    return Candidate(
        number=number,
        genome=genome,
        architecture=architecture,
        evaluation=Evaluation(architecture=architecture, outcome=outcome, objectives=objectives),
        outcome=outcome,
        lineage=lineage or {"kind": "random", "parent": None, "genes": []},
        duplicate_of=duplicate_of,
        attempts=1,
        proposed=BEGIN,
        finished=BEGIN + timedelta(hours=number + 1.0 if after is None else after),
    )


def mutation(*genes: str) -> dict[str, Any]:
    return {"kind": "mutation", "parent": 0, "genes": list(genes)}


def test_history_by_hand() -> None:
    found = [
        make_candidate(0, (5.0, 5.0)),
        make_candidate(1, (3.0, 8.0)),
        make_candidate(2, None),
        make_candidate(3, (6.0, 6.0)),
        make_candidate(4, (2.0, 2.0)),
        make_candidate(5, (1.0, 1.0), duplicate_of=4),
    ]
    moments = insight.history(found, NAMES, (10.0, 10.0))
    assert [moment.hypervolume for moment in moments] == pytest.approx([25, 29, 29, 29, 64])
    assert [moment.gain for moment in moments] == pytest.approx([25, 4, 0, 0, 35])
    assert [moment.entered for moment in moments] == [True, True, False, False, True]
    assert [moment.evaluations for moment in moments] == [1, 2, 3, 4, 5]
    assert [moment.hours for moment in moments] == pytest.approx([1, 2, 3, 4, 5])


def test_history_follows_completion_not_numbers() -> None:
    found = [make_candidate(0, (5.0, 5.0), after=3.0), make_candidate(1, (6.0, 6.0), after=1.0)]
    moments = insight.history(found, NAMES, (10.0, 10.0))
    assert [moment.number for moment in moments] == [1, 0]
    assert [moment.gain for moment in moments] == pytest.approx([16, 9])


def test_history_of_nothing() -> None:
    assert insight.history([], NAMES, (1.0, 1.0)) == []
    assert insight.earnings_by_kind([], []) == []
    assert insight.frame([]).empty


@pytest.mark.parametrize(
    ("volumes", "epsilon", "k", "expected"),
    [
        ([1.0, 1.0, 1.0], 0.0, 2, True),
        ([1.0, 1.0, 1.0], 0.0, 3, False),
        ([1.0, 1.005, 1.005], 0.01, 2, True),
        ([1.0, 1.006, 1.012], 0.01, 2, False),
        ([0.0, 0.0, 0.0], 0.01, 3, True),
        ([], 0.01, 1, False),
    ],
)
def test_stalled(volumes: list[float], epsilon: float, k: int, expected: bool) -> None:
    assert insight.stalled(volumes, epsilon, k) is expected


def test_stalled_is_the_rule_that_ends_searches() -> None:
    rng = np.random.default_rng(0)
    config = SearchConfig.model_validate({"stop_epsilon": 0.02, "aging": {"population_size": 2}})
    standing, found = Standing(config, (10.0, 10.0)), []
    for number in range(60):
        values = tuple(float(value) for value in 1 + 9 * rng.random(2))
        found.append(make_candidate(number, values))
        standing.add(number, str(number), values)
        if number >= 1:
            volumes = [moment.hypervolume for moment in insight.history(found, NAMES, (10.0, 10.0))][1:]
            assert volumes[-1] == pytest.approx(standing.hypervolume)
            assert insight.stalled(volumes, 0.02, 5) is (standing.without_gain >= 5)


def test_earnings_by_hand() -> None:
    found = [
        make_candidate(0, (5.0, 5.0)),
        make_candidate(1, (3.0, 8.0), lineage=mutation("hidden_size")),
        make_candidate(2, None, lineage=mutation("hidden_size")),
        make_candidate(3, (2.0, 2.0), lineage=mutation("only.blocks", "hidden_size")),
    ]
    moments = insight.history(found, NAMES, (10.0, 10.0))
    kinds = {earning.name: earning for earning in insight.earnings_by_kind(found, moments)}
    assert kinds["mutation"].proposals == 3
    assert kinds["mutation"].entered == pytest.approx(2 / 3)
    assert kinds["mutation"].mean_gain == pytest.approx(39 / 3)
    assert kinds["mutation"].gain_share + kinds["random"].gain_share == pytest.approx(1.0)
    genes = {earning.name: earning for earning in insight.earnings_by_gene(found, moments)}
    assert genes["only.blocks"].mean_gain == pytest.approx(35)
    assert genes["hidden_size"].mean_gain == pytest.approx(13)
    assert list(genes) == ["hidden_size", "only.blocks"]
    table = insight.frame(list(genes.values()))
    assert list(table["name"]) == ["hidden_size", "only.blocks"]
    assert table["proposals"].tolist() == [3, 1]


def test_importances_name_the_genes_that_decide() -> None:
    rng = np.random.default_rng(1)
    found, seen = [], set()
    for number in range(120):
        genome = SPACE.sample(rng)
        if SPACE.identity(genome) not in seen:
            seen.add(SPACE.identity(genome))
            width, blocks = float(str(genome["hidden_size"])), float(str(genome["only.blocks"]))
            found.append(make_candidate(number, (1 / width, blocks), genome=genome))
    importances = gene_importances(found, SPACE, NAMES)
    assert next(iter(importances["loss"])) == "hidden_size"
    assert next(iter(importances["decode_latency"])) == "only.blocks"
    for shares in importances.values():
        assert set(shares) == set(SPACE.genes)
        assert sum(shares.values()) == pytest.approx(1.0)


def test_importances_of_too_little() -> None:
    assert gene_importances([], SPACE, NAMES) == {}
    assert gene_importances([make_candidate(0, (1.0, 2.0))], SPACE, NAMES) == {}
    constant = [make_candidate(number, (1.0, float(number))) for number in range(20)]
    assert list(gene_importances(constant, SPACE, NAMES)) == ["decode_latency"]


def test_picture(tmp_path) -> None:
    found = [make_candidate(number, (10 - number, 1.0 + number)) for number in range(6)]
    moments = insight.history(found, NAMES, (12.0, 12.0))
    for name, rows in (("six", moments), ("one", moments[:1]), ("none", [])):
        insight.draw_history(rows, tmp_path / f"{name}.png", "hypervolume of a search")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
