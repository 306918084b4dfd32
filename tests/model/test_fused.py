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
from torch.nn import functional as F

from archsearch.model import fla_ops, self_check
from archsearch.model.chunked import delta_rule_chunked, dplr_chunked, gla_chunked, selective_scan_chunked, ssd_chunked
from archsearch.model.fused import bonus, convolution, decay, forget, heads, norm, residual, shift, swiglu, transition
from archsearch.model.layers import LAYERS
from archsearch.model.layers.attention import windowed_attention
from archsearch.operators import FFN, OPERATORS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")


@pytest.fixture(autouse=True)
def _short_walks(monkeypatch):
    """The interpreter takes its time for tokens behind the end of a sequence."""
    for name in ("TOKENS", "BACKWARD_TOKENS"):
        monkeypatch.setattr(convolution, name, 16)


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
def test_log_decay():
    x = [draw(2, 700, seed=0)]
    agree(lambda x: [decay.log_decay(20 * x[0], 3)], lambda x: [decay.log_decay_reference(20 * x[0], 3)], x)


@interpreted
@pytest.mark.parametrize("size", [24, 1500])
def test_forget_gates(size):
    x = [draw(2, 5, 3 * size, seed=0)]
    agree(lambda x: forget.forget_gates(4 * x[0]), lambda x: forget.forget_gates_reference(4 * x[0]), x)


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
@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize(("dims", "taps", "bias", "normed"), [([8, 8, 12], 4, False, 2), ([16, 24, 24], 3, True, 0)])
@pytest.mark.parametrize("behind", [0, 3])
def test_convolve(length, dims, taps, bias, normed, behind, monkeypatch):
    for name in ("TOKENS", "BACKWARD_TOKENS"):
        monkeypatch.setattr(convolution, name, 8)  # several programs along time
    weights = [draw(2 * dim, 1, taps, seed=dim) for dim in dims]
    biases = [draw(2 * dim, seed=dim) for dim in dims] if bias else [None] * 3
    inputs = [draw(2, length, 2 * sum(dims) + 5, seed=0), *weights, *biases]

    def run(function):
        def call(x):
            slice = x[0][..., 2 : 2 + 2 * sum(dims) + behind]
            return function(slice, x[1:4], x[4:] if bias else None, dims, normed)

        return call

    agree(run(convolution.convolve), run(convolution.convolve_reference), inputs)


@interpreted
def test_convolve_within():
    """A wider projection, with one part of it alone."""
    weights = [draw(channels, 1, 4, seed=1) for channels in (16, 0, 0)]
    biases = [draw(channels, seed=2) for channels in (16, 0, 0)]
    inputs = [draw(2, 9, 2 + 16 + 3, seed=0), *weights, *biases]

    def within(x):
        parts, before, behind = convolution.convolve_within(x[0], 2, x[1:4], x[4:], [8] * 3, normed=0)
        return [parts[0], 2 * before, 3 * behind]

    def apart(x):
        before, inside, behind = x[0].tensor_split([2, 18], dim=-1)
        return [convolution.convolve_reference(inside, x[1:4], x[4:], [8] * 3, normed=0)[0], 2 * before, 3 * behind]

    agree(within, apart, inputs)


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
@pytest.mark.parametrize(("length", "size"), [(1, 24), (9, 24), (5, 300)])
def test_token_shift(length, size):
    inputs = [draw(2, length, size, seed=0), *(draw(size, seed=seed) for seed in range(1, 7))]
    agree(lambda x: shift.token_shift(x[0], x[1:]), lambda x: shift.token_shift_reference(x[0], x[1:]), inputs)


@interpreted
@pytest.mark.parametrize(("length", "heads", "dim"), [(1, 3, 8), (70, 2, 24)])
def test_transition(length, heads, dim):
    inputs = [draw(2, length, heads * dim, seed=seed) for seed in range(3)]
    inputs += [draw(heads * dim, seed=seed) for seed in range(3, 7)]

    def run(function):
        return lambda x: function(*x[:3], x[3:], -0.6, heads)

    agree(run(transition.transition), run(transition.transition_reference), inputs)


@interpreted
@pytest.mark.parametrize(("length", "heads", "dim"), [(1, 3, 8), (70, 2, 24)])
def test_bonus(length, heads, dim):
    inputs = [draw(2, length, heads, dim, seed=seed) for seed in range(4)]
    inputs += [draw(2, length, heads * dim, seed=4), *(draw(heads * dim, seed=seed) for seed in range(5, 8))]

    def run(function):
        return lambda x: [function(*x[:5], x[5:], 1e-5)]

    agree(run(bonus.bonus), run(bonus.bonus_reference), inputs)


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


def without_library(monkeypatch) -> None:
    """The library's recurrences replaced by ours, so that all that surrounds them runs on a CPU."""

    def delta_net(q, k, v, logits, gain, eps, *, keep):
        o, state = delta_rule_chunked(q, k, v, logits[..., : q.shape[2]].float().sigmoid())
        return F.rms_norm(o, gain.shape, gain, eps), state

    def gated(q, k, v, beta, decay, a_log, dt_bias, *, keep):
        decay = -a_log.exp() * F.softplus(decay.float() + dt_bias)
        return delta_rule_chunked(q, k, v, beta.float().sigmoid(), decay)

    def kda(q, k, v, beta, decay, a_log, dt_bias, *, keep):
        decay = -a_log.exp()[:, None] * F.softplus(decay.float() + dt_bias.unflatten(0, (len(a_log), -1)))
        return delta_rule_chunked(q, k, v, beta.float().sigmoid(), decay)

    def ssd(c, b, x, dt, rate, skip, dt_bias, *, keep):
        dt = F.softplus(dt.float() + dt_bias)
        o, state = ssd_chunked(c, b, x * dt[..., None], dt * rate)
        return (o + skip[:, None] * x).to(x.dtype), state

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):  # noqa: N803
        """As mamba-ssm documents it: channels before time."""
        assert delta_softplus
        dt = F.softplus(delta.float() + delta_bias[:, None])
        o, state = selective_scan_chunked(C.mT, B.mT, u.mT, dt.mT, A)
        o = ((o.mT + D[:, None] * u) * F.silu(z)).to(u.dtype)
        return (o, state) if return_last_state else o

    def attention(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def windowed(q, k, v, window):
        return windowed_attention(*(t.transpose(1, 2) for t in (q, k, v)), window).transpose(1, 2)

    monkeypatch.setattr(fla_ops, "delta_rule", lambda *args, keep: halved(delta_net(*args, keep=keep)))
    monkeypatch.setattr(fla_ops, "gated_delta_rule", lambda *args, keep: halved(gated(*args, keep=keep)))
    monkeypatch.setattr(fla_ops, "kda", lambda *args, keep: halved(kda(*args, keep=keep)))
    monkeypatch.setattr(fla_ops, "rwkv7", lambda *args, keep: halved(dplr_chunked(*args[:-1])))
    monkeypatch.setattr(fla_ops, "gla", lambda *args, keep: halved(gla_chunked(*args)))
    monkeypatch.setattr(fla_ops, "ssd", ssd)
    monkeypatch.setattr(fla_ops, "operator", lambda path: selective_scan_fn)
    monkeypatch.setattr(fla_ops, "attention", attention)
    monkeypatch.setattr(fla_ops, "windowed_attention", windowed)


def halved(mixed):
    return mixed[0].bfloat16(), mixed[1]


CASES = [
    ("a", 32, {"head_dim": 8, "kv_heads": 2, "qk_norm": True, "qkv_bias": True}),
    ("w", 32, {"head_dim": 16, "window": 5}),
    ("m", 32, {"state": 8}),
    ("m2", 32, {"head_dim": 8, "state": 16, "groups": 2}),
    ("d", 32, {"head_dim": 8, "heads": 3, "conv": 3}),
    ("gd", 32, {"head_dim": 8, "expand_v": 1.5, "heads": 3}),
    ("kda", 32, {"head_dim": 8, "expand_v": 1.5, "heads": 3, "gate_rank": 5}),
    ("gl", 64, {"head_dim": 16, "gate_rank": 5}),
    ("r7", 32, {"head_dim": 8}),
    ("hg", 32, {"head_dim": 16}),
    ("f", 32, {"multiple_of": 8}),
]


@interpreted
@pytest.mark.parametrize(("kind", "hidden", "options"), CASES, ids=[case[0] for case in CASES])
def test_fused_layers_agree_with_the_reference(kind, hidden, options, monkeypatch):
    without_library(monkeypatch)
    found = self_check.agreement(OPERATORS[kind].model_validate(options), hidden, torch.device("cpu"), 10)
    assert found.sound, found.errors


@interpreted
@torch.no_grad()
@pytest.mark.parametrize(("kind", "hidden", "options"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("length", [2, 9])
def test_fused_prefill_leaves_the_state_of_the_reference(kind, hidden, options, length, monkeypatch):
    without_library(monkeypatch)
    layer = LAYERS[kind](OPERATORS[kind].model_validate(options), hidden)
    layer.init_weights(torch.Generator().manual_seed(0), 0.1)
    x, cpu = draw(2, length, hidden, seed=1), torch.device("cpu")
    states = []
    for path in ("torch", "fla"):
        layer.path = path
        states.append(layer.allocate_state(2, 12, cpu, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer.prefill(x, states[-1])
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@interpreted
@pytest.mark.parametrize(("size", "used"), [(40, "both"), (1000, "both"), (40, "sum"), (40, "norm")])
def test_add_norm(size, used):
    inputs = [draw(2, 3, size, seed=0), draw(2, 3, size, seed=1), draw(size, seed=2)]

    def run(function):
        def call(x):
            total, normed = function(*x, 1e-6)
            return {"both": [total, normed], "sum": [total, x[2]], "norm": [normed]}[used]

        return call

    agree(run(residual.add_norm), run(residual.add_norm_reference), inputs)
