"""mamba-ssm's scans, where it is installed, against fla's linear attention and against the fp32 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.model import fla_ops
from archsearch.model.chunked import selective_scan_chunked, ssd_chunked
from archsearch.model.requirements import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]
BATCH, HEADS, DIM, STATE = 2, 4, 64, 128
BOUND = 2e-2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def run(function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], *, of_state: bool = True) -> list[Tensor]:
    """Output, state, and the gradients of a function of the output, and of the state if asked, for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output, state = function(*leaves)
    weights = torch.cos(torch.arange(output.numel(), device="cuda")).view(output.shape)
    total = (output.float() * weights).sum()
    (total + state.float().sin().sum() if of_state else total).backward()
    return [output.detach(), state.detach(), *(leaf.grad for leaf in leaves)]


def compare(found: list[Tensor], want: list[Tensor], names: str) -> None:
    errors = {
        name: float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-3))  # one token has no decay
        for name, a, b in zip(["output", "state", *names.split()], found, want, strict=True)
    }
    print(" ".join(f"{name}={error:.1e}" for name, error in errors.items()))
    assert all(error < BOUND for error in errors.values()), errors


@pytest.mark.skipif(not installed("mamba_ssm"), reason="mamba-ssm is not installed")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [65, 300])
def test_ssd_through_mamba_ssm_and_through_fla(groups: int, length: int) -> None:
    half = [draw(BATCH, length, groups, STATE, seed=seed).bfloat16() for seed in (0, 1)]
    half += [draw(BATCH, length, HEADS, DIM, seed=2).bfloat16(), draw(BATCH, length, HEADS, seed=3).bfloat16()]
    inputs = [*half, -draw(HEADS, seed=4).exp(), draw(HEADS, seed=5), draw(HEADS, seed=6) - 3]

    def reference(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, bias: Tensor):
        step = F.softplus(dt + bias)
        o, state = ssd_chunked(c, b, x * step[..., None], step * rate)
        return o + skip[:, None] * x, state

    exact = run(reference, [x.float() for x in inputs])
    scan = run(lambda *x: fla_ops.ssd_scan(*x, keep=True), inputs)
    linear = run(lambda *x: fla_ops.ssd_linear(*x, keep=True), inputs)
    names = "c b x dt rate skip bias"
    for found, want in ((scan, exact), (linear, exact), (scan, linear)):
        compare(found, want, names)


@pytest.mark.skipif(not installed("selective_scan_cuda"), reason="mamba-ssm's CUDA extension is not built")
@pytest.mark.parametrize("length", [1, 65, 300])
def test_selective_scan_against_the_reference(length: int) -> None:
    inner, state = 256, 16
    half = [draw(BATCH, length, state, seed=seed).bfloat16() for seed in (0, 1)]
    half += [draw(BATCH, length, inner, seed=seed).bfloat16() for seed in (2, 3)]
    inputs = [*half, -draw(inner, state, seed=4).exp(), draw(inner, seed=5)]
    inputs += [draw(BATCH, length, inner, seed=6).bfloat16(), draw(inner, seed=7) - 3]

    def reference(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, z: Tensor, bias: Tensor):
        o, last = selective_scan_chunked(c, b, x, F.softplus(dt + bias), rate)
        return (o + skip * x) * F.silu(z), last

    # mamba-ssm gives no gradient of the last state; training asks for none
    found = run(lambda *x: fla_ops.selective_scan(*x, keep=True), inputs, of_state=False)
    want = run(reference, [x.float() for x in inputs], of_state=False)
    compare(found, want, "c b x dt rate skip z bias")
