"""The fused kernels of the training path against their plain-torch twins, forward and backward.

On a CPU the kernels run in Triton's interpreter, in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from archsearch.model import self_check
from archsearch.model.fused import convolution, heads, norm, swiglu
from archsearch.operators import FFN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="is what starts this process")
def test_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "." * 10 in done.stdout, "the tests of the kernels were skipped"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agree(kernel, reference, inputs: list[Tensor | None], *rest) -> None:
    """Outputs and gradients of every input are equal."""
    found = []
    for function in (kernel, reference):
        leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
        out = function(leaves, *rest)
        sum((torch.cos(torch.arange(y.numel()).view_as(y)) * y).sum() for y in out).backward()
        found.append([y.detach() for y in out] + [x.grad for x in leaves if x is not None])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("inner", [8, 1030])
def test_swiglu(inner):
    x = [draw(2, 3, 2 * inner, seed=0)]
    agree(lambda x: [swiglu.swiglu(*x)], lambda x: [swiglu.swiglu_reference(*x)], x)


@interpreted
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("dim", "length"), [(8, 5), (24, 17)])
def test_split_heads(norm, dim, length):
    table = heads.rotary_table(length, dim, 1e4, torch.device("cpu"))
    gains = [draw(dim, seed=1), draw(dim, seed=2)] if norm else [None, None]

    def run(function):
        return lambda x: function(x[0], table, x[1], x[2], 3, 2, 1e-6)

    inputs = [draw(2, length, 7 * dim, seed=0), *gains]
    agree(run(heads.split_heads), run(heads.split_heads_reference), inputs)


@interpreted
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize(("dims", "taps", "bias", "normed"), [([8, 8, 12], 4, False, 2), ([16, 24, 24], 3, True, 0)])
def test_convolve(length, dims, taps, bias, normed):
    weights = [draw(2 * dim, 1, taps, seed=dim) for dim in dims]
    biases = [draw(2 * dim, seed=dim) for dim in dims] if bias else [None] * 3
    inputs = [draw(2, length, 2 * sum(dims) + 5, seed=0), *weights, *biases]

    def run(function):
        def call(x):
            slice = x[0][..., 2 : 2 + 2 * sum(dims)]
            return function(slice, x[1:4], x[4:] if bias else None, dims, normed)

        return call

    agree(run(convolution.convolve), run(convolution.convolve_reference), inputs)


@interpreted
@pytest.mark.parametrize("gate", ["none", "after", "before", "sigmoid"])
@pytest.mark.parametrize(("shape", "gains"), [((2, 3, 40), 40), ((2, 5, 3, 8), 8), ((2, 5, 3, 8), 24), ((1, 1, 9), 9)])
def test_norm(gate, shape, gains):
    inputs = [draw(*shape[:-1], 2 * shape[-1], seed=0), draw(gains, seed=1), draw(*shape, seed=2)]

    def run(function):
        def call(x):
            first = x[0].unflatten(-1, (2, -1))[..., 1, :]
            given = None if gate == "none" else x[2]
            activation = "sigmoid" if gate == "sigmoid" else "silu"
            normed = function(first, x[1], 1e-6, given, gate_first=gate == "before", activation=activation)
            return [normed, x[2]]

        return call

    agree(run(norm.norm), run(norm.norm_reference), inputs)


@interpreted
def test_the_self_check_finds_a_wrong_gradient(monkeypatch):
    config, cpu = FFN(multiple_of=8), torch.device("cpu")
    found = self_check.agreement(config, 16, cpu, 5)
    assert found.sound, found.errors
    assert found.errors.keys() == {"output", "input", "gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    right = swiglu._SwiGLU.backward
    monkeypatch.setattr(swiglu._SwiGLU, "backward", staticmethod(lambda ctx, grad: right(ctx, grad) * 1.2))
    wrong = self_check.agreement.__wrapped__(config, 16, cpu, 5)
    assert not wrong.sound
    assert wrong.errors["output"] == found.errors["output"]
