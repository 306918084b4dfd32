from __future__ import annotations

import pytest
from pydantic import ValidationError

from archsearch.config import ProxyConfig
from archsearch.proxy.schedule import learning_rate, validation_steps


def rates(steps: int = 100, **recipe: object) -> list[float]:
    config = ProxyConfig.model_validate({"learning_rate": 1, "warmup": 0.1, "final_rate": 0.2, **recipe})
    return [learning_rate(config, index, steps) for index in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_rate_rises_linearly_then_never_again(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.1 * (index + 1) for index in range(10)])
    assert found[10] == max(found) == 1.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[99] == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_shapes_differ() -> None:
    middle = {name: rates(schedule=name)[54] for name in ("cosine", "linear", "wsd", "constant")}
    assert middle == pytest.approx({"cosine": 0.6071, "linear": 0.6045, "wsd": 1.0, "constant": 1.0}, abs=1e-3)
    assert sum(rate < 1 for rate in rates(schedule="wsd", cooldown=0.3)[10:]) == 30
    assert rates(schedule="cosine", warmup=0)[50] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_a_single_step_has_a_rate(schedule: str, warmup: float) -> None:
    assert 0.2 <= rates(1, schedule=schedule, warmup=warmup)[0] <= 1.0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6}, "warmup and cooldown together"),
        ({"schedule": "exponential"}, "'cosine', 'linear', 'wsd' or 'constant'"),
        ({"cooldown": 0}, "greater than 0"),
        ({"final_rate": 2}, "less than or equal to 1"),
    ],
)
def test_nonsense_is_refused(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProxyConfig.model_validate(recipe)


@pytest.mark.parametrize(
    ("steps", "validations", "rungs", "expected"),
    [
        (100, 4, [], [25, 50, 75, 100]),
        (2, 5, [], [1, 2]),
        (1, 1, [], [1]),
        (7, 2, [], [4, 7]),
        (100, 2, [10, 50, 100, 300], [10, 50, 100]),
    ],
)
def test_validations_are_evenly_spaced_and_at_rungs(
    steps: int, validations: int, rungs: list[int], expected: list[int]
) -> None:
    assert validation_steps(steps, validations, rungs) == expected
