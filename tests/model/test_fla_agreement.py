"""Recurrences and layers against flash-linear-attention's naive functions and transformers' Mamba-2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from archsearch.model.chunked import delta_rule_chunked, dplr_chunked, gla_chunked, ssd_chunked
from archsearch.model.layers import LAYERS, Layer
from archsearch.model.recurrence import delta_rule_step, gla_step
from archsearch.operators import OPERATORS

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 128, 3, 16, 24


def naive(operator: str) -> ModuleType:
    """The file of naive functions of fla alone: importing the package costs seconds and warns without a GPU."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "ops", operator, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operator}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(BATCH, LENGTH, HEADS, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    q, k = (F.normalize(draw(KEY, seed=seed), dim=-1) for seed in (0, 1))
    v, beta = draw(VALUE, seed=2), draw(seed=3).sigmoid()
    return {"q": q, "k": k, "v": v, "beta": beta, "g": F.logsigmoid(draw(seed=4))}


def close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Outputs agree, and states once their [K, V] is turned to our [V, K]."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1].mT, rtol=1e-4, atol=1e-5)


def test_delta_rule(inputs):
    del inputs["g"]
    fla = naive("delta_rule")
    ours = delta_rule_chunked(*inputs.values())
    # these two take [B, H, T, D]
    swapped = [x.transpose(1, 2) for x in inputs.values()]
    for function in (fla.delta_rule_recurrence, fla.delta_rule_chunkwise):
        output, state = function(*swapped)
        close(ours, (output.transpose(1, 2), state))


def test_gated_delta_rule(inputs):
    fla = naive("gated_delta_rule")
    ours = delta_rule_chunked(*inputs.values())
    close(ours, fla.naive_recurrent_gated_delta_rule(**inputs, output_final_state=True))
    close(ours, fla.naive_chunk_gated_delta_rule(**inputs, output_final_state=True))


def test_gated_delta_rule_step_from_a_state(inputs):
    fla = naive("gated_delta_rule")
    state = torch.randn(BATCH, HEADS, VALUE, KEY, generator=torch.Generator().manual_seed(5))
    one = {name: x[:, :1] for name, x in inputs.items()}
    output, final = delta_rule_step(*(x[:, 0] for x in one.values()), state)
    theirs = fla.naive_recurrent_gated_delta_rule(**one, initial_state=state.mT, output_final_state=True)
    close((output[:, None], final), theirs)


def test_kda(inputs):
    fla = naive("kda")
    inputs["g"] = F.logsigmoid(draw(KEY, seed=6))
    ours = delta_rule_chunked(*inputs.values())
    close(ours, fla.naive_recurrent_kda(**inputs, output_final_state=True))
    close(ours, fla.naive_chunk_kda(**inputs, output_final_state=True))


def test_kda_step_from_a_state(inputs):
    inputs["g"] = F.logsigmoid(draw(KEY, seed=6))
    state = torch.randn(BATCH, HEADS, VALUE, KEY, generator=torch.Generator().manual_seed(5))
    one = {name: x[:, :1] for name, x in inputs.items()}
    output, final = delta_rule_step(*(x[:, 0] for x in one.values()), state)
    theirs = naive("kda").naive_recurrent_kda(**one, initial_state=state.mT, output_final_state=True)
    close((output[:, None], final), theirs)


def test_rwkv7(inputs):
    fla = naive("generalized_delta_rule/dplr")
    q, k, v, removed = inputs["q"], inputs["k"], inputs["v"], F.normalize(draw(KEY, seed=6), dim=-1)
    written, decay = removed * draw(KEY, seed=7).sigmoid(), -0.6065 * draw(KEY, seed=8).sigmoid()
    ours = dplr_chunked(q * KEY**-0.5, k, v, -removed, written, decay)
    # these two take [B, H, T, D]
    swapped = [x.transpose(1, 2) for x in (q, k, v, -removed, written, decay)]
    for function in (fla.dplr_recurrence, fla.dplr_chunkwise):
        output, state = function(*swapped)
        close(ours, (output.transpose(1, 2), state))


def test_gla(inputs):
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gates = F.logsigmoid(draw(KEY, seed=6))
    theirs = naive("gla").naive_recurrent_gla(q, k, v, gates, output_final_state=True)
    close(gla_chunked(q, k, v, gates), theirs)
    state = torch.randn(BATCH, HEADS, VALUE, KEY, generator=torch.Generator().manual_seed(5))
    one = [x[:, :1] for x in (q, k, v, gates)]
    output, final = gla_step(*(x[:, 0] for x in one), state)
    theirs = naive("gla").naive_recurrent_gla(*one, initial_state=state.mT, output_final_state=True)
    close((output[:, None], final), theirs)


def test_ssd(inputs):
    q, k, v, g = inputs["q"], inputs["k"], inputs["v"], inputs["g"]
    ours = ssd_chunked(q, k, v, g)
    fla = naive("simple_gla")
    for function in (fla.naive_recurrent_simple_gla, fla.naive_chunk_simple_gla):
        close(ours, function(q, k, v, g, scale=1.0, output_final_state=True))


def layer_of(kind: str, hidden: int, **options: float) -> Layer:
    layer = LAYERS[kind](OPERATORS[kind].model_validate(options), hidden)
    layer.init_weights(torch.Generator().manual_seed(0), 0.1)
    return layer


def convolved(layer: Layer, name: str, x: Tensor) -> Tensor:
    """Projection, causal convolution, SiLU and split into heads, by the weights' names."""
    weights = layer.state_dict()
    projected = x @ weights[f"{name}_proj.weight"].T
    kernel = weights[f"{name}_conv1d.weight"]
    taps, channels = kernel.shape[-1], len(kernel)
    y = F.conv1d(projected.mT, kernel, padding=taps - 1, groups=channels)[..., : x.shape[1]]
    return F.silu(y).mT.unflatten(-1, (layer.heads, -1))


def l2norm(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["d", "gd"])
def test_delta_layers_by_their_published_formulas(kind):
    layer = layer_of(kind, 48, head_dim=16)
    weights, x = layer.state_dict(), torch.randn(BATCH, LENGTH, 48, generator=torch.Generator().manual_seed(1))
    q, k, v = (convolved(layer, name, x) for name in "qkv")
    beta = (x @ weights["b_proj.weight"].T).sigmoid()
    g = torch.zeros_like(beta)
    if kind == "gd":
        g = -weights["A_log"].exp() * F.softplus(x @ weights["a_proj.weight"].T + weights["dt_bias"])
    o, _ = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(l2norm(q), l2norm(k), v, beta, g)
    o = rms(o) * weights["o_norm.weight"]
    if kind == "gd":
        o = o * F.silu(x @ weights["g_proj.weight"].T).unflatten(-1, (layer.heads, -1))
    torch.testing.assert_close(layer(x), o.flatten(-2) @ weights["o_proj.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gla_layer_by_its_published_formulas():
    layer = layer_of("gl", 64, head_dim=16)
    weights, x = layer.state_dict(), torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    q, k, v = ((x @ weights[f"{name}_proj.weight"].T).unflatten(-1, (layer.heads, -1)) for name in "qkv")
    gates = x @ weights["gk_proj.0.weight"].T @ weights["gk_proj.1.weight"].T + weights["gk_proj.1.bias"]
    gates = F.logsigmoid(gates).unflatten(-1, (layer.heads, -1)) / 16
    o, _ = naive("gla").naive_recurrent_gla(q, k, v, gates)
    gate = F.silu(x @ weights["g_proj.weight"].T).unflatten(-1, (layer.heads, -1))
    o = rms(o) * weights["g_norm_swish_gate.weight"] * gate
    torch.testing.assert_close(layer(x), o.flatten(-2) @ weights["o_proj.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kda_layer_by_its_published_formulas():
    layer = layer_of("kda", 48, head_dim=16)
    weights, x = layer.state_dict(), torch.randn(BATCH, LENGTH, 48, generator=torch.Generator().manual_seed(1))
    q, k, v = (convolved(layer, name, x) for name in "qkv")
    beta = (x @ weights["b_proj.weight"].T).sigmoid()
    raw = x @ weights["f_proj.0.weight"].T @ weights["f_proj.1.weight"].T + weights["dt_bias"]
    g = -weights["A_log"].exp()[:, None] * F.softplus(raw).unflatten(-1, (layer.heads, -1))
    o, _ = naive("kda").naive_recurrent_kda(l2norm(q), l2norm(k), v, g, beta)
    gate = x @ weights["g_proj.0.weight"].T @ weights["g_proj.1.weight"].T + weights["g_proj.1.bias"]
    o = rms(o) * weights["o_norm.weight"] * gate.sigmoid().unflatten(-1, (layer.heads, -1))
    torch.testing.assert_close(layer(x), o.flatten(-2) @ weights["o_proj.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hgrn2_layer_by_its_published_formulas():
    layer = layer_of("hg", 48, head_dim=16)
    weights, x = layer.state_dict(), torch.randn(BATCH, LENGTH, 48, generator=torch.Generator().manual_seed(1))
    q, f, v = ((x @ weights[f"{name}_proj.weight"].T).unflatten(-1, (layer.heads, -1)) for name in "qfi")
    o, _ = naive("gla").naive_recurrent_gla(F.silu(q), 1 - f.sigmoid(), v, F.logsigmoid(f))
    o = rms(o.flatten(-2)) * weights["g_norm.weight"]
    torch.testing.assert_close(layer(x), o @ weights["o_proj.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rwkv7_layer_by_its_published_formulas():
    layer = layer_of("r7", 48, head_dim=16)
    weights, x = layer.state_dict(), torch.randn(BATCH, LENGTH, 48, generator=torch.Generator().manual_seed(1))
    for name in "wag":
        weights[f"{name}_lora.lora.0.weight"].normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    r, w, k, v, a, g = (torch.lerp(x, shifted, weights[f"x_{name}"]) for name in "rwkvag")
    r, k, v = (y @ weights[f"{name}_proj.weight"].T for name, y in zip("rkv", (r, k, v), strict=True))
    low = [y @ weights[f"{name}_lora.lora.0.weight"].T for name, y in zip("wag", (w, a, g), strict=True)]
    ups = [weights[f"{name}_lora.lora.2.weight"].T for name in "wag"]
    w = -0.6065306597126334 * (low[0].tanh() @ ups[0] + weights["w_lora.lora.2.bias"]).sigmoid()
    a = (low[1] @ ups[1] + weights["a_lora.lora.2.bias"]).sigmoid()
    heads = [t.unflatten(-1, (layer.heads, -1)) for t in (r, k + k * (a - 1) * weights["k_a"], v, w, a)]
    r, k, v, w, a = heads
    removal = x.lerp(shifted, weights["x_k"]) @ weights["k_proj.weight"].T * weights["k_k"]
    removal = l2norm(removal.unflatten(-1, (layer.heads, -1)))
    dplr = naive("generalized_delta_rule/dplr").dplr_recurrence
    swapped = [t.transpose(1, 2) for t in (r * 4, k, v, -removal, removal * a, w)]
    o = F.group_norm(dplr(*swapped)[0].transpose(1, 2).flatten(0, 1).flatten(1), layer.heads, eps=16e-6)
    o = o.unflatten(0, (BATCH, LENGTH)).unflatten(-1, (layer.heads, -1))
    o = o + (r * k * weights["r_k"].unflatten(0, (layer.heads, -1))).sum(-1, keepdim=True) * v
    o = o.flatten(-2) * (low[2].sigmoid() @ ups[2])
    torch.testing.assert_close(layer(x), o @ weights["o_proj.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mamba2_layer_equals_that_of_transformers():
    layer = layer_of("m2", 64, head_dim=16, state=24)
    config = Mamba2Config(
        hidden_size=64, num_heads=8, head_dim=16, state_size=24, expand=2, n_groups=1, layer_norm_epsilon=1e-6
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mamba_layer_equals_that_of_transformers():
    layer = layer_of("m", 64, state=8)
    theirs = MambaMixer(MambaConfig(hidden_size=64, state_size=8, expand=2), layer_idx=0)
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    theirs.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in layer.state_dict().items()})
    x = torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-5)
