"""The paths that a GPU trains with: checks on this device, capture in a CUDA graph."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.architecture import make_architecture
from archsearch.errors import EnvironmentUnfit
from archsearch.model import fla_ops, self_check, training_path
from archsearch.model.hybrid import build_model
from archsearch.model.layers import LAYERS
from archsearch.operators import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]
CUDA = torch.device("cuda")
OPTIONS = [
    ("a", 384, {"head_dim": 96}),
    ("a", 256, {"head_dim": 256, "heads": 2, "kv_heads": 1, "qk_norm": True, "qkv_bias": True}),
    ("w", 256, {"head_dim": 64, "kv_heads": 2, "window": 37}),
    ("m2", 128, {"head_dim": 64, "state": 64, "groups": 2}),
    ("d", 256, {"head_dim": 32}),
    ("d", 192, {"head_dim": 96}),
    ("d", 384, {"head_dim": 192}),
    ("gd", 256, {"head_dim": 64, "expand_v": 2.0}),
    ("gd", 240, {"head_dim": 24}),
    ("gl", 256, {"head_dim": 64, "expand_k": 1.0}),
    ("kda", 192, {"head_dim": 96, "gate_rank": 24}),
    ("kda", 256, {"head_dim": 64, "expand_v": 2.0}),
    ("r7", 192, {"head_dim": 96, "gate_rank": 5}),
    ("hg", 192, {"head_dim": 96}),
    ("f", 200, {"ratio": 1.7, "multiple_of": 8}),
]


@pytest.mark.parametrize(("kind", "hidden", "options"), OPTIONS, ids=[f"{c[0]}-{json.dumps(c[2])}" for c in OPTIONS])
def test_kernels_agree_with_the_reference(kind, hidden, options):
    found = self_check.require_sound(OPERATORS[kind].model_validate(options), hidden, CUDA)
    print(kind, options, found.errors)


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_step_can_be_captured_and_replays_the_same(kind):
    config = OPERATORS[kind]()
    with CUDA:
        layer = LAYERS[kind](config, 512)
        layer.init_weights(torch.Generator(CUDA).manual_seed(0), 0.02)
    try:
        layer.require()
    except EnvironmentUnfit as error:
        pytest.skip(error.cause)
    layer.path = layer.paths[-1] if "fla" not in layer.paths else "fla"
    x = torch.randn(2, 300, 512, device=CUDA)

    def step() -> Tensor:
        layer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            y = layer(x)
        y.float().square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
        gradient = layer.get_submodule(layer.residual).weight.grad.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.get_submodule(layer.residual).weight.grad, gradient, rtol=1e-2, atol=1e-4)


def test_gradients_of_projections_are_not_rounded_to_16_bits():
    with CUDA:
        layers = [nn.Linear(64, size, bias=size > 5) for size in (24, 40)]
        x, y = torch.randn(3, 500, 64, dtype=torch.bfloat16), torch.randn(3, 500, 64, dtype=torch.bfloat16)
    fla_ops.project(x.requires_grad_(), *layers).backward(y)
    expected = y.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    found = torch.cat([layer.weight.grad for layer in layers])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layers[0].bias.grad, y.sum((0, 1)).float()[:24], rtol=2e-2, atol=1e-1)


def test_a_model_is_prepared_and_trains():
    operators = [{"kind": kind} for kind in ("a", "d", "gd", "m2", "f")]
    model = build_model(make_architecture(hidden_size=512, vocab_size=64, operators=operators), device=CUDA)
    training_path.prepare(model, "auto", CUDA, torch.bfloat16)
    assert "torch" not in model.paths().values()
    tokens = torch.randint(64, (2, 129), device=CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
