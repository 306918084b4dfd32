"""Grids: what is refused, a small real one trained on this CPU, resumed, analysed and printed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.architecture import SPACES, Architecture
from archsearch.commands.scaling import start
from archsearch.config import RunConfig, load_config
from archsearch.errors import ArchsearchError, ConfigError, UsageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.scaling.grid import Trained, collect, make_grid, train_grid
from archsearch.scaling.study import analyse, run_scaling

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


def quick_config(*overrides: str) -> RunConfig:
    return load_config(SPACES / "tiny.yaml", [*QUICK, *overrides])


@dataclass(frozen=True)
class TrueLaw:
    """Losses after a known law, latencies after a known cost; ``calls`` counts the evaluations."""

    config: RunConfig
    calls: list[str]
    broken: str = ""

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        depth, width = len(architecture.operators) // 2, architecture.hidden_size
        name = f"{depth}x{width}"
        self.calls.append(name)
        if name == self.broken:
            return Evaluation(architecture=architecture, outcome=Outcome.OOM)
        tokens = self.config.proxy.tokens
        noise = math.exp(np.random.default_rng([depth, width, tokens]).normal(0, 0.002))
        loss = math.log((4 + 6 * depth**-0.9 + 300 * width**-0.8 + 500 * tokens**-0.4) * noise)
        values = {"loss": loss, "decode_latency": 0.1 + depth * (0.02 + width / 5000)}
        wanted = {key: values[key] for key in self.config.search.objectives}
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=wanted, seed=seed)


def test_a_real_grid_trains_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"depths": "2,1", "widths": "64,32", "block": "a f"}
    assert start(quick_config(), tmp_path / "study", **options) == 0
    printed = capsys.readouterr().out
    assert "within [s]" in printed
    assert "2 value(s) of depth" in printed
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("trials/*.json")}
    assert len(trained) == 4
    assert start(quick_config(), tmp_path / "study", **options, json=True) == 0
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "scaling"
    models = document["models"]
    assert [(m["depth"], m["width"]) for m in models] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert all(m["outcome"] == "OK" and m["loss"] > 0 and m["latency"] > 0 for m in models)
    assert document["choices"][-1]["loss"] == pytest.approx(math.exp(min(m["loss"] for m in models)))
    assert json.loads((tmp_path / "study" / "scaling.json").read_text())["models"] == models
    assert (tmp_path / "study" / "scaling.png").stat().st_size > 10_000


def test_a_known_law_comes_back_through_the_study(tmp_path: Path) -> None:
    config = quick_config()
    grid = make_grid(config, [1, 2, 4, 8], [64, 96, 128, 192], budgets=[10**4, 10**5, 10**6], block="a f")
    calls: list[str] = []
    _, analysis = run_scaling(grid, tmp_path, lambda config: TrueLaw(config, calls))
    assert len(calls) == 48
    assert analysis.law is not None
    truth = {"alpha": 0.9, "beta": 0.8, "gamma": 0.4}
    for name, value in truth.items():
        assert analysis.law.interval(name).low <= value <= analysis.law.interval(name).high
    assert analysis.held_out is not None
    assert len(analysis.held_out.predictions) == 7 * 3
    assert analysis.held_out.worst_error < 0.053
    latencies = [choice.size.latency for choice in analysis.choices]
    assert latencies == sorted(latencies)
    assert all(choice.size.latency <= choice.budget * 1.001 for choice in analysis.choices)


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    config = quick_config()
    grid = make_grid(config, [1, 2], [64, 96], budgets=[10**4, 10**5], block="a f")
    calls: list[str] = []

    def stop_in_the_second_run(config: RunConfig) -> Any:
        def evaluate(architecture: Architecture, *, seed: int) -> Evaluation:
            if len(calls) == 6:
                raise KeyboardInterrupt
            return TrueLaw(config, calls)(architecture, seed=seed)

        return evaluate

    with pytest.raises(KeyboardInterrupt):
        train_grid(grid, tmp_path, stop_in_the_second_run)
    assert sum(model.loss is not None for model in collect(grid, tmp_path)) == 6
    train_grid(grid, tmp_path, lambda config: TrueLaw(config, calls))
    assert len(calls) == 8
    assert sum(model.loss is not None for model in collect(grid, tmp_path)) == 8


def test_a_failed_model_is_named_and_left_out(tmp_path: Path) -> None:
    grid = make_grid(quick_config(), [1, 2, 4, 8], [64, 96, 128, 192], block="a f")
    _, analysis = run_scaling(grid, tmp_path, lambda config: TrueLaw(config, [], broken="2x96"))
    assert analysis.notes[0] == "1 models have no loss: 2x96 (OOM)"
    assert analysis.law is not None
    assert all((c.size.depth, c.size.width) != (2, 96) for c in analysis.choices)


def test_two_budgets_give_the_law_of_the_larger(tmp_path: Path) -> None:
    grid = make_grid(quick_config(), [1, 2, 4, 8], [64, 96, 128, 192], budgets=[10**4, 10**5], block="a f")
    _, analysis = run_scaling(grid, tmp_path, lambda config: TrueLaw(config, []))
    assert analysis.law is not None
    assert "gamma" not in analysis.law.parameters
    assert any("100,000 tokens" in note for note in analysis.notes)


def test_another_grid_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    for depths, tokens in (([1, 2], "2K"), ([1, 3], "2K"), ([1, 2], "2K")):
        grid = make_grid(quick_config(f"proxy.tokens={tokens}"), depths, [64, 96], block="a f")
        if depths == [1, 3]:
            with pytest.raises(UsageError, match="another space"):
                train_grid(grid, tmp_path, lambda config: TrueLaw(config, []))
        else:
            train_grid(grid, tmp_path, lambda config: TrueLaw(config, []))
    grid = make_grid(quick_config("proxy.learning_rate=0.5"), [1, 2], [64, 96], block="a f")
    with pytest.raises(UsageError, match="another proxy"):
        train_grid(grid, tmp_path, lambda config: TrueLaw(config, []))


def test_the_block_is_the_first_of_the_space_unless_given() -> None:
    grid = make_grid(quick_config(), [1, 2], [64, 96])
    assert grid.block == "a"
    assert make_grid(quick_config(), [1, 2], [64, 96], block="d f m2").block == "d f m2"


def test_sizes_between_are_those_that_exist() -> None:
    grid = make_grid(quick_config(), [2, 5], [64, 160], block="a f")
    assert grid.sizes_between() == ([2, 3, 4, 5], [64, 96, 128, 160])


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"depths": [2]}, "1 value(s) of depths"),
        ({"widths": [64, 64]}, "widths: a value is repeated"),
        ({"depths": [0, 2]}, "depths must be at least 1"),
        ({"widths": [64, 100]}, "at width 100 cannot exist"),
        ({"block": "a q"}, "unknown operator 'q'"),
        ({"block": " "}, "pattern is empty"),
        ({"depths": [2, 700]}, "from 0 to 512"),
        ({"budgets": [-5]}, "budgets must be at least 1"),
        ({"depths": list(range(1, 200)), "widths": list(range(64, 6464, 32))}, "models"),
    ],
)
def test_grids_that_are_refused(arguments: dict[str, Any], cause: str) -> None:
    defaults: dict[str, Any] = {"depths": [1, 2], "widths": [64, 96], "block": "a f"}
    chosen = defaults | arguments
    with pytest.raises(ConfigError) as caught:
        make_grid(quick_config(), chosen.pop("depths"), chosen.pop("widths"), **chosen)
    assert cause in caught.value.cause


@pytest.mark.parametrize(
    "words",
    [
        {"depths": "1,x"},
        {"widths": ""},
        {"budgets": "10Q"},
        {"metric": "bits"},
        {"latencies": "1,-2"},
        {"latencies": "nan"},
        {"depths": "1.5,2"},
    ],
)
def test_words_that_are_refused(tmp_path: Path, words: dict[str, str]) -> None:
    with pytest.raises(ArchsearchError) as caught:
        start(quick_config(), tmp_path / "out", **({"depths": "1,2", "widths": "64,96"} | words))
    assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "out").exists()


def test_predicted_latencies_are_called_so() -> None:
    config = quick_config("latency.source=profile", "latency.profile=some.json")
    grid = make_grid(config, [1, 2], [64, 96], block="a f")
    tokens = grid.budgets[-1]
    trained = [Trained(d, w, tokens, Outcome.OK, 4.0 / d, 0.1 * d * w) for d in grid.depths for w in grid.widths]
    analysis = analyse(grid, trained)
    assert "decode latency is predicted by the latency profile, not measured" in analysis.notes
    choices = analysis.summary()["choices"]
    assert choices
    assert not any(choice["latency_measured"] for choice in choices)
