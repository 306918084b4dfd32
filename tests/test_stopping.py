"""The stopping rule: who is clearly dominated at a rung, and who is not."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig, RunConfig
from archsearch.evaluation import Evaluation, Outcome, Rung
from archsearch.stopping import Forecast, StoppingRule, Verdict, features

NOTHING = ((0.0, 0.0, 0.0),) * 3
SURE = Forecast(weights=(-1.0, 1.0, 0.0), width=0.1, inverse=NOTHING)
"""A loss at the rung ends one nat lower, give or take 0.1."""
RULE = StoppingRule(
    objectives=("loss", "decode_latency"), front=((4, (1.8, 3.0)), (7, (2.0, 1.0))), forecasts={1000: SURE}
)
MODEL = make_architecture(hidden_size=128, vocab_size=256, operators="f")


@pytest.mark.parametrize(
    ("loss", "latency", "by"),
    [
        (3.15, 1.0, 7),
        (3.05, 1.0, None),  # expected above 2.0, but not clearly
        (3.15, 0.9, None),  # faster than all that ended better
        (3.15, 4.0, 4),  # the better of two rivals is named
        (2.95, 3.0, 4),
        (2.85, 3.0, None),
    ],
)
def test_only_the_clearly_dominated_stop(loss: float, latency: float, by: int | None) -> None:
    verdict = RULE.verdict(1000, {"loss": loss, "decode_latency": latency, "parameters": 1.0})
    assert (verdict.dominated_by if verdict else None) == by
    if verdict:
        assert verdict.expected == pytest.approx(loss - 1)
        assert verdict.expected - verdict.margin > verdict.to_beat


def test_a_rung_without_a_line_stops_nobody() -> None:
    assert RULE.verdict(2000, {"loss": 99.0, "decode_latency": 99.0}) is None
    assert StoppingRule(objectives=("loss",)).verdict(1000, {"loss": 99.0}) is None


def test_a_single_objective_needs_no_latency() -> None:
    forecast = Forecast(weights=(-1.0, 1.0), width=0.1, inverse=((0.0, 0.0),) * 2)
    rule = StoppingRule(objectives=("loss",), front=((0, (2.0,)),), forecasts={1000: forecast})
    assert rule.verdict(1000, {"loss": 3.2}) is not None
    assert rule.verdict(1000, {"loss": 3.0}) is None


def test_the_margin_grows_where_little_is_known() -> None:
    forecast = Forecast(weights=(0.0, 1.0), width=0.1, inverse=((0.1, 0.0), (0.0, 0.5)))
    assert forecast.margin([1.0, 0.0]) == pytest.approx(0.1 * 1.1**0.5)
    assert forecast.margin([1.0, 5.0]) > forecast.margin([1.0, 3.5]) > forecast.margin([1.0, 0.0])


def test_other_objectives_take_part_in_a_forecast() -> None:
    known = {"decode_latency": 1.0, "loss": 3.0, "parameters": 9.0}
    assert features(("decode_latency", "loss"), known) == [1.0, 3.0, pytest.approx(math.log(2))]


def test_a_rule_survives_json() -> None:
    assert StoppingRule.model_validate_json(RULE.model_dump_json()) == RULE


def test_a_stopped_evaluation_has_a_verdict_and_no_other_has_one() -> None:
    verdict = Verdict(tokens=10, dominated_by=0, expected=2.0, margin=0.1, to_beat=1.0)
    rungs = (Rung(tokens=10, objectives={"loss": 3.0}),)
    stopped = Evaluation(architecture=MODEL, outcome=Outcome.STOPPED, rungs=rungs, verdict=verdict)
    assert not stopped.ok
    assert not stopped.outcome.is_failure
    assert Evaluation.model_validate_json(stopped.model_dump_json()) == stopped
    with pytest.raises(ValidationError, match="verdict"):
        Evaluation(architecture=MODEL, outcome=Outcome.STOPPED, rungs=rungs)
    with pytest.raises(ValidationError, match="verdict"):
        Evaluation(architecture=MODEL, outcome=Outcome.STOPPED, verdict=verdict)
    with pytest.raises(ValidationError, match="verdict"):
        Evaluation(architecture=MODEL, outcome=Outcome.OK, rungs=rungs, verdict=verdict)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ({"rungs": [5, 5, 10]}, "each larger than the one before"),
        ({"rungs": ["5M"]}, "two budgets or more"),
        ({"rungs": [0, "5M"]}, "each larger than the one before"),
        ({"rungs": ["20M", "5M"]}, "each larger than the one before"),
        ({"rungs": [1000, 2000, "5M"]}, "closer together than one step"),
        ({"rungs": ["5M", "20M"], "tokens": "80M"}, "set tokens to the last rung"),
        ({"rungs": ["5M", "many"]}, "many"),
    ],
)
def test_rungs_that_cannot_be(proxy: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProxyConfig.model_validate(proxy)


def test_the_last_rung_is_the_budget() -> None:
    assert ProxyConfig.model_validate({"rungs": ["5M", "20M", "80M"]}).tokens == 80_000_000
    assert ProxyConfig().rungs == ()


def test_rungs_need_a_loss() -> None:
    space = {"name": "s", "hidden_size": 64, "vocab_size": 256, "stages": [{"name": "x", "pattern": "a", "blocks": 1}]}
    space["options"] = {"a": {"head_dim": 32}}
    data = {"space": space, "search": {"objectives": ["parameters"]}, "proxy": {"rungs": ["5M", "20M"]}}
    with pytest.raises(ValidationError, match="loss is no objective"):
        RunConfig.model_validate(data)
