"""The benchmark of the latency profile: the pictures and the searches that it compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.latency_profile import load_profile
from benchmarks.formulas import FORMULAS
from benchmarks.latency_profile import Profiled, picture
from benchmarks.search import NAMES, Task

PROFILES = sorted((Path(__file__).parents[2] / "latency_profiles").glob("*.json"))


def job(error: float | None, evaluations: int) -> Profiled:
    return Profiled(Task(None, NAMES[:2], (), "scaling"), "aging, some", 1, evaluations, (), error)


def test_what_is_known_is_the_latency_up_to_an_error() -> None:
    problem = FORMULAS["scaling"]
    genome = {name: choices[0] for name, choices in problem.space.genes.items()}
    true = problem.objectives(problem.space.build(genome))[1]
    exact, wrong = (job(error, 1)._variant(problem)._cheap for error in (0.0, 0.03))
    assert job(None, 1)._variant(problem)._cheap is None
    assert exact is not None
    assert wrong is not None
    assert exact(genome) == {"decode_latency": pytest.approx(true)}
    assert wrong(genome) == wrong(genome) != exact(genome)
    assert wrong(genome)["decode_latency"] == pytest.approx(true, rel=0.15)


def test_a_search_runs() -> None:
    curve, milliseconds = job(0.03, 22).run()
    assert len(curve) == 22
    assert milliseconds > 0


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_are_complete_and_are_drawn(path: Path, tmp_path: Path) -> None:
    profile = load_profile(path)
    assert profile.error is not None
    assert profile.fingerprint.kind == "cuda"
    picture(profile, tmp_path / "error.png")
    assert (tmp_path / "error.png").stat().st_size > 10_000
