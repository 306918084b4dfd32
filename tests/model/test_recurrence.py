"""The chunked recurrences where they are numerically hard; the layers' tests cover the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.chunked import (
    delta_rule_chunked,
    dplr_chunked,
    gla_chunked,
    selective_scan_chunked,
    ssd_chunked,
)
from archsearch.model.recurrence import (
    delta_rule_step,
    dplr_step,
    gla_step,
    selective_scan_step,
    ssd_step,
    stepwise,
)

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 150, 3, 8, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, LENGTH, *shape, generator=torch.Generator().manual_seed(seed))


def agree(chunked, step, *inputs: Tensor | None) -> None:
    """Outputs, final states and gradients of the fp32 chunked form equal those of fp64 steps."""
    found = []
    for function, dtype in ((chunked, torch.float32), (step, torch.float64)):
        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in inputs]
        if function is step:
            state = torch.zeros(BATCH, HEADS, VALUE, KEY, dtype=dtype)
            output, final = stepwise(step, *leaves, state=state)
        else:
            output, final = function(*leaves)
        (output.sin().sum() + final.cos().sum()).backward()
        found.append([output, final, *(leaf.grad for leaf in leaves if leaf is not None)])
    for actual, expected in zip(*found, strict=True):
        assert torch.isfinite(actual).all()
        assert (actual - expected).norm() <= 3e-5 * expected.norm() + 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 30.0, 1000.0])
def test_gla_with_weak_and_strong_decay(strength):
    agree(gla_chunked, gla_step, draw(HEADS, KEY), draw(HEADS, KEY, seed=1), draw(HEADS, VALUE), -strength * decay(KEY))


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 30.0, 1000.0])
def test_ssd_with_weak_and_strong_decay(strength):
    agree(ssd_chunked, ssd_step, draw(1, KEY), draw(1, KEY, seed=1), draw(HEADS, VALUE), -strength * decay())


@pytest.mark.parametrize("strength", [None, 0.0, 0.01, 1.0, 30.0, 1000.0])
def test_delta_rule_with_weak_and_strong_decay(strength):
    q, k = (F.normalize(draw(HEADS, KEY, seed=seed), dim=-1) for seed in (1, 2))
    log_decay = None if strength is None else -strength * decay()
    agree(delta_rule_chunked, delta_rule_step, q, k, draw(HEADS, VALUE), draw(HEADS).sigmoid(), log_decay)


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 30.0, 1000.0])
def test_channelwise_delta_rule_with_weak_and_strong_decay(strength):
    q, k = (F.normalize(draw(HEADS, KEY, seed=seed), dim=-1) for seed in (1, 2))
    inputs = q, k, draw(HEADS, VALUE), draw(HEADS).sigmoid(), -strength * decay(KEY)
    agree(delta_rule_chunked, delta_rule_step, *inputs)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.6, 30.0, 1000.0])
def test_dplr_with_weak_and_strong_decay(strength):
    removed = F.normalize(draw(HEADS, KEY, seed=2), dim=-1)
    inputs = draw(HEADS, KEY, seed=1), draw(HEADS, KEY, seed=4), draw(HEADS, VALUE)
    rates = draw(HEADS, KEY, seed=5).sigmoid()
    agree(dplr_chunked, dplr_step, *inputs, -removed, removed * rates, -strength * decay(KEY))


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0, 1000.0])
def test_selective_scan_with_weak_and_strong_decay(strength):
    rates = -strength * torch.rand(HEADS, KEY, generator=torch.Generator().manual_seed(6))
    inputs = draw(KEY), draw(KEY, seed=1), draw(HEADS, seed=2), decay(), rates

    def step(c, b, x, dt, state):
        return selective_scan_step(c, b, x, dt, leaves[1], state)

    leaves = [rates.clone().requires_grad_(), rates.double().requires_grad_()]
    found = []
    for index, dtype in enumerate((torch.float32, torch.float64)):
        parts = [x.to(dtype, copy=True).requires_grad_() for x in inputs[:4]]
        if index:
            state = torch.zeros(BATCH, HEADS, KEY, dtype=dtype)
            output, final = stepwise(step, *parts, state=state)
        else:
            output, final = selective_scan_chunked(*parts, leaves[0])
        (output.sin().sum() + final.cos().sum()).backward()
        found.append([output, final, *(part.grad for part in (*parts, leaves[index]))])
    for actual, expected in zip(*found, strict=True):
        assert torch.isfinite(actual).all()
        assert (actual - expected).norm() <= 3e-5 * expected.norm() + 1e-6


def test_delta_rule_with_one_key_repeated_and_overwritten():
    # powers of the overlap matrix reach 1e18 here; only a solve keeps the numbers
    k = F.normalize(draw(HEADS, KEY)[:, :1], dim=-1).expand(-1, LENGTH, -1, -1)
    agree(delta_rule_chunked, delta_rule_step, k, k, draw(HEADS, VALUE), torch.full((BATCH, LENGTH, HEADS), 0.99), None)


def test_autocast_does_not_reach_the_recurrences():
    inputs = draw(HEADS, KEY), draw(HEADS, KEY, seed=1), draw(HEADS, VALUE), -decay(KEY)
    # autocast leaves fp64 alone, so this is exact with or without it
    expected = gla_chunked(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gla_chunked(*inputs)
    torch.testing.assert_close(actual, expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert {x.dtype for x in actual} == {torch.float32}


def decay(*shape: int) -> Tensor:
    """Uniform in [0, 1], with exact zeros among them."""
    drawn = torch.rand(BATCH, LENGTH, HEADS, *shape, generator=torch.Generator().manual_seed(3))
    return drawn.where(drawn > 0.1, 0.0)
