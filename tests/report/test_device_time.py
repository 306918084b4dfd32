"""The share of the workers' time that neither trained nor measured, from the evaluations' own seconds."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from archsearch.architecture import make_architecture
from archsearch.cli import main
from archsearch.evaluation import Evaluation, Outcome
from archsearch.report.device_time import device_time
from archsearch.search.study import Candidate
from tests.kits.runs import fake_evaluations, make_run

ARCHITECTURE = make_architecture(hidden_size=128, vocab_size=256, operators="a")


def candidate(seconds: dict[str, float], duplicate_of: int | None = None) -> Candidate:
    evaluation = Evaluation(architecture=ARCHITECTURE, outcome=Outcome.NAN, seconds=seconds)
    now = datetime(2026, 1, 1)
    return Candidate(0, {}, ARCHITECTURE, evaluation, Outcome.NAN, {}, duplicate_of, 1, now, now)


def test_shares() -> None:
    first = {"idle": 4.0, "import": 1.0, "latency": 10.0, "compile": 3.0, "train": 60.0, "validate": 2.0}
    found = device_time([candidate(first), candidate({"train": 20.0}), candidate({"train": 99.0}, duplicate_of=0)])
    assert found.total == 100.0
    assert found.share("train") == 0.8
    assert found.overhead == pytest.approx(0.1)
    assert found.others == ["idle", "compile", "validate", "import"]
    assert str(found) == (
        "1.7 minutes of the workers: 80% training, 10% measuring, 10.0% else "
        "(idle 4.0%, compile 3.0%, validate 2.0%, import 1.0%)"
    )


def test_nothing_yet() -> None:
    assert (device_time([]).total, device_time([]).overhead) == (0, 0)


def test_inspect_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_evaluations(monkeypatch)
    make_run(tmp_path / "r")
    assert main(["inspect", str(tmp_path / "r")]) == 0
    assert "minutes of the workers: 100% training" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device_time"]["overhead"] == pytest.approx(0)
