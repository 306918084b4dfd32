"""validate-proxy: its plan, a study over arithmetic, a small real one, and what is refused."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.architecture import SPACES, Architecture
from archsearch.commands import validity
from archsearch.config import RunConfig, load_config
from archsearch.errors import ArchsearchError, ConfigError, StorageError, UsageError
from archsearch.evaluation import Evaluation, Outcome, Rung
from archsearch.validity.plan import curve_budgets, make_plan
from archsearch.validity.study import read_noise, run_validity

QUICK = [
    "execution.executor=inline",
    "execution.min_free_bytes=0",
    "proxy.tokens=2K",
    "proxy.batch=4",
    "proxy.context=32",
    "proxy.validation_tokens=1K",
    "proxy.validations=1",
    "latency.tokens=8",
    "latency.steps=2",
    "latency.strata=1",
    "latency.repeats=1",
]


def config(*overrides: str) -> RunConfig:
    return load_config(SPACES / "tiny.yaml", [*QUICK, *overrides])


@dataclass
class TrueCurves:
    """Losses with a known order at the end, which more tokens show better; ``noise`` between seeds."""

    config: RunConfig
    noise: float = 0.01
    broken: str = ""
    interrupt_at: int | None = None
    calls: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        self.calls.append((architecture.id, seed, self.config.proxy.tokens))
        if len(self.calls) == self.interrupt_at:
            signal.raise_signal(signal.SIGTERM)
        if architecture.notation == self.broken:
            return Evaluation(architecture=architecture, outcome=Outcome.NAN, seed=seed)
        values = {"loss": self.loss(architecture, seed, self.config.proxy.tokens), "decode_latency": 1.0}
        values["decode_latency"] = architecture.parameters / 1e6
        rungs = tuple(
            Rung(tokens=tokens, objectives={"loss": self.loss(architecture, seed, tokens)})
            for tokens in self.config.proxy.rungs[:-1]
        )
        wanted = {name: values[name] for name in self.config.search.objectives}
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=wanted, rungs=rungs, seed=seed)

    def loss(self, architecture: Architecture, seed: int, tokens: int) -> float:
        true = int(architecture.id[:6], 16) / 16**6
        moved = np.random.default_rng([int(architecture.id[:6], 16), seed, tokens]).normal()
        return 2 + true + moved * (self.noise + 300 / tokens)


def test_a_plan_samples_the_space_and_trains_on_one_curve() -> None:
    plan = make_plan(config(), 8, long=20_000, seeds=3)
    assert len({a.id for a in plan.architectures}) == 8
    assert plan == make_plan(config(), 8, long=20_000, seeds=3)
    assert (plan.short, plan.long) == (2000, 20_000)
    assert len(plan.tasks) == 8
    assert {(task.seed) for task in plan.seed_tasks} == {1, 2}
    assert plan.short_config.search.objectives == ("loss", "decode_latency")
    assert plan.short_config.proxy.tokens == 2000
    assert plan.long_config.proxy.rungs == plan.budgets == (625, 1250, 2000, 5000, 10_000, 20_000)
    assert plan.seed_config.space.limits.decode_latency is None
    RunConfig.model_validate(plan.long_config.model_dump(mode="json"))


@pytest.mark.parametrize(("short", "long"), [(100, 300), (2000, 2129), (2000, 10**9), (128, 256), (1000, 9999)])
def test_budgets_of_a_curve_are_distinct_steps(short: int, long: int) -> None:
    budgets = curve_budgets(config(), short, long)
    assert budgets[-1] == long
    assert short in budgets
    steps = [-(-budget // 128) for budget in budgets]
    assert len(set(steps)) == len(steps)


def test_a_study_finds_what_is_known(tmp_path: Path) -> None:
    plan = make_plan(config(), 24, long=40_000, seeds=2)
    evaluators: list[TrueCurves] = []

    def make(of: RunConfig, checkpoints: Path | None) -> TrueCurves:
        evaluators.append(TrueCurves(of))
        return evaluators[-1]

    summary, analysis = run_validity(plan, tmp_path / "v", make, wanted=0.9)
    assert (summary.reason, summary.exit_code) == ("finished", 0)
    truth = [TrueCurves(plan.long_config).loss(a, 0, 40_000) for a in plan.architectures]
    assert [row.long for row in analysis.rows] == truth
    assert analysis.spearman is not None
    assert 0.5 < analysis.spearman.value < 1
    assert analysis.noise is not None
    assert analysis.noise.freedom == 24
    assert analysis.noise.low < 0.01 + 300 / 2000 < analysis.noise.high
    by_tokens = {point.tokens: point.spearman.value for point in analysis.budgets if point.of == "long"}
    assert list(by_tokens) == list(plan.budgets[:-1])
    assert by_tokens[20_000] > by_tokens[625]
    assert analysis.shortest is not None
    assert by_tokens[analysis.shortest] >= 0.9
    record = json.loads((tmp_path / "v" / "validity.json").read_text())
    assert record["spearman"]["value"] == analysis.spearman.value
    assert len(record["architectures"]) == 24
    assert (tmp_path / "v" / "validity.png").stat().st_size > 10_000
    before = sum(len(e.calls) for e in evaluators)
    assert before == 24 * 3
    again = run_validity(plan, tmp_path / "v", make, wanted=0.9)[1]
    assert sum(len(e.calls) for e in evaluators) == before
    assert again.summary() == analysis.summary()


def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    plan = make_plan(config(), 4, long=20_000, seeds=2)
    calls: list[Any] = []
    summary, analysis = run_validity(
        plan, tmp_path / "v", lambda of, _: TrueCurves(of, interrupt_at=6, calls=calls), wanted=0.8
    )
    assert (summary.reason, summary.exit_code) == ("interrupted", 143)
    assert analysis.spearman is None
    assert [len(row.short) for row in analysis.rows] == [2, 2, 1, 1]
    summary, analysis = run_validity(plan, tmp_path / "v", lambda of, _: TrueCurves(of, calls=calls))
    assert (summary.reason, len(calls), len(set(calls))) == ("finished", 12, 12)
    assert analysis.spearman is not None
    with pytest.raises(UsageError, match="another plan"):
        run_validity(make_plan(config(), 5, long=20_000), tmp_path / "v", lambda of, _: TrueCurves(of))
    (tmp_path / "v" / "plan.json").write_text("{}")
    with pytest.raises(StorageError, match=r"plan\.json"):
        run_validity(plan, tmp_path / "v", lambda of, _: TrueCurves(of))


def test_failures_leave_the_others(tmp_path: Path) -> None:
    plan = make_plan(config(), 6, long=20_000, seeds=1)
    broken = plan.architectures[2].notation
    analysis = run_validity(plan, tmp_path / "v", lambda of, _: TrueCurves(of, broken=broken))[1]
    lost = sum(a.notation == broken for a in plan.architectures)
    assert analysis.spearman is not None
    assert analysis.spearman.count == 6 - lost
    assert analysis.noise is None
    assert any("--seeds 2" in line for line in validity.lines(analysis))


def test_noise_applies_to_the_same_proxy_only(tmp_path: Path) -> None:
    plan = make_plan(config(), 4, long=20_000, seeds=2)
    run_validity(plan, tmp_path / "v", lambda of, _: TrueCurves(of))
    found = read_noise(tmp_path / "v", config("proxy.validations=3").proxy)
    assert found.freedom == 4
    assert found.source.startswith("v: ")
    with pytest.raises(ConfigError, match=r"proxy\.tokens 2000, this run with 4000"):
        read_noise(tmp_path / "v", config("proxy.tokens=4K").proxy)
    with pytest.raises(UsageError, match=r"validity\.json"):
        read_noise(tmp_path, plan.config.proxy)
    (tmp_path / "v" / "validity.json").write_text("[]")
    with pytest.raises(StorageError, match="cannot read"):
        read_noise(tmp_path / "v", plan.config.proxy)


def test_a_real_study_trains_prints_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"architectures": 3, "long": "512", "short": "128", "seeds": 2}
    assert validity.start(config(), tmp_path / "v", **options) == 0
    printed = capsys.readouterr().out
    assert "Spearman, seed against seed" in printed
    assert "decode [s]" in printed
    assert "choosing by the proxy loses" in printed
    assert "seed noise of the proxy loss" in printed
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "v").glob("*/*.json")}
    assert len(files) == 9
    assert not list((tmp_path / "v" / "checkpoints").iterdir())
    assert validity.start(config(), tmp_path / "v", **options, json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "validate-proxy"
    assert all(row["latency"] > 0 and len(row["short"]) == 2 for row in document["architectures"])
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"architectures": 2}, "--architectures 2", 2),
        ({"long": "2K"}, "no longer training", 2),
        ({"long": "many"}, "--long", 2),
        ({"long": "0"}, "--long 0", 2),
        ({"short": "-5"}, "--short", 2),
        ({"seeds": 0}, "--seeds 0", 2),
        ({"correlation": 1.5}, "--correlation 1.5", 2),
        ({"architectures": 10**6}, "different architectures", 3),
    ],
)
def test_what_cannot_be_studied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str, code: int
) -> None:
    monkeypatch.setattr("archsearch.validity.plan.TRIES", 1e-3)
    with pytest.raises(ArchsearchError, match=message) as error:
        validity.start(config(), tmp_path / "v", **{"architectures": 4, "long": "20K", **options})
    assert error.value.exit_code == code
    assert not (tmp_path / "v").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    plan = make_plan(config(), 4, long=20_000)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="something else"):
            run_validity(plan, path, lambda of, _: TrueCurves(of))
