"""The Python interface."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import archsearch
from archsearch.errors import ConfigError, UsageError
from archsearch.search.progress import Progress
from tests.kits.runs import TINY, fake_evaluations

SIZES = {"evaluations": 6, "executor": "inline", "search__aging__population_size": 3}


def test_run_and_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluations(monkeypatch)
    seen = []
    run = archsearch.run(TINY, out=tmp_path / "r", seed=3, proxy__tokens=1000, **SIZES, on_progress=seen.append)
    assert seen[-1].done == 6
    assert (run.config.search.seed, run.config.proxy.tokens) == (3, 1000)
    assert (run.path / "pareto.png").exists()
    again = archsearch.open_run(tmp_path / "r")
    assert repr(again) == f"Run('{tmp_path / 'r'}')"
    assert [candidate.number for candidate in again.front()] == [candidate.number for candidate in run.front()]
    frame = again.dataframe()
    assert len(frame) == len(again.candidates())
    assert {"number", "objective.loss", "notation"} <= set(frame.columns)
    path = again.export(again.front()[0].number, tmp_path / "best.yaml", format="yaml")
    assert archsearch.load_architecture(path) == again.front()[0].architecture


def test_a_ready_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluations(monkeypatch)
    config = archsearch.load_config(TINY, ["search.evaluations=2", "execution.executor=inline"])
    assert len(archsearch.run(config, out=tmp_path / "r").candidates()) == 2
    with pytest.raises(UsageError, match="ready config"):
        archsearch.run(config, out=tmp_path / "s", seed=1)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        archsearch.run(TINY, out=tmp_path / "r", proxy__bogus=1)
    with pytest.raises(UsageError, match="does not exist"):
        archsearch.open_run(tmp_path / "r")
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        _ = archsearch.bogus
    assert not (tmp_path / "r").exists()


def test_version() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(archsearch.__version__)}"$', project, re.M)


def test_an_interrupt_ends_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_evaluations(monkeypatch)

    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        archsearch.run(TINY, out=tmp_path / "r", **SIZES, on_progress=interrupt)
    run = archsearch.open_run(tmp_path / "r")
    assert run.results().evaluated < 6
    assert run.search().progress.done == 6
