"""How each operator kind decodes one token: merged weights, static state, and a chain of launches.

All mixers take three kernels (norm and input projections; everything between; output projection and residual)
and an FFN two, so that no kind is slow only because it is fused less than another. Mamba, the first, takes four:
what its channels select by is itself a projection of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from archsearch.model import layers
from archsearch.model.hybrid import Residual
from archsearch.model.kernels import Launch
from archsearch.model.kernels.attention import Heads
from archsearch.model.kernels.convolution import Output, value_rows
from archsearch.model.kernels.delta import DeltaGates
from archsearch.model.kernels.gla import Decay
from archsearch.model.kernels.kda import KDAGates
from archsearch.model.kernels.mamba import Selective
from archsearch.model.kernels.projection import Epilogue, Norm
from archsearch.model.kernels.rwkv7 import TimeMix
from archsearch.model.kernels.shift import BLOCK, Shift
from archsearch.model.kernels.ssd import Rates
from archsearch.model.kernels.workspace import (
    Chain,
    Workspace,
    gain_of,
    merged,
    projection,
    read_out,
    residual,
    ring,
    widened,
)
from archsearch.model.layers.parts import ShortConvolution
from archsearch.model.layers.rwkv7 import STRONGEST


def build_chain(layer: Residual, work: Workspace) -> Chain:
    """The decode step of one residual layer: kernels, or for a kind that has none its own plain-torch step."""
    return CHAINS.get(type(layer.op), _plain)(layer, work)


def _plain(layer: Residual, work: Workspace) -> Chain:
    state = layer.op.allocate_state(work.batch, work.capacity, work.hidden.device, work.hidden.dtype)

    @torch.no_grad()
    def step() -> None:
        work.hidden.copy_(layer.step(work.hidden, state, work.position))

    return Chain(layer.kind, [step], state, plain=True)


def _ffn(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.FFN, layer.op)
    inner = work.activations("projected", op.down_proj.in_features)
    weight, norm = merged(op.gate_proj, op.up_proj), gain_of(layer.norm)
    gated = partial(work.kernels.project, work.hidden, weight, inner, Epilogue.GATED, norm)
    return Chain(layer.kind, [gated, *residual(work, inner, op.down_proj.weight)])


def _attention(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.Attention, layer.op)
    qkv = op.q_proj, op.k_proj, op.v_proj
    bias = None if op.q_proj.bias is None else torch.cat([p.bias.detach() for p in qkv])
    projected, launches = projection(layer, work, merged(*qkv), bias)
    norms, eps = None, 0.0
    if op.q_norm is not None and op.k_norm is not None:
        norms, eps = (op.q_norm.weight.detach(), op.k_norm.weight.detach()), op.q_norm.eps
    heads = Heads(op.heads, op.kv_heads, op.head_dim, eps, isinstance(op, layers.SlidingWindowAttention))
    slots, rotary = op.visible(work.capacity), work.rotary(op.head_dim, op.theta)
    state = {name: work.zeros(op.kv_heads, slots, op.head_dim).normal_() for name in ("k", "v")}
    mixed = work.activations("mixed", op.heads * op.head_dim)
    scratch = work.scratch(heads, slots)
    step = partial(work.kernels.attend, projected, norms, rotary, work.position, state["k"], state["v"], scratch)
    launches += [partial(step, mixed, heads), *residual(work, mixed, op.o_proj.weight)]
    return Chain(layer.kind, launches, state)


def _delta(layer: Residual, work: Workspace) -> Chain:
    return _delta_rule(layer, work, work.kernels.delta, None)


def _gated_delta(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.GatedDeltaNet, layer.op)
    gates = DeltaGates(-op.A_log.detach().float().exp(), op.dt_bias.detach().float())
    return _delta_rule(layer, work, work.kernels.delta, gates, op.a_proj, op.g_proj)


def _kda(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.KDA, layer.op)
    (decay_down, decay), (gate_down, gate) = (cast(Iterable[nn.Linear], p) for p in (op.f_proj, op.g_proj))
    rates, steps = -op.A_log.detach().float().exp(), op.dt_bias.detach().float()
    gates = KDAGates(rates, steps, decay.weight.detach(), gate.weight.detach(), gate.bias.detach())
    return _delta_rule(layer, work, work.kernels.kda, gates, decay_down, gate_down)


def _delta_rule(layer: Residual, work: Workspace, step: Launch, gates: Any, *extra: nn.Linear) -> Chain:
    """A mixer of the delta rule; ``extra`` projections come behind those of q, k, v and b."""
    op = cast(layers.DeltaNet | layers.GatedDeltaNet | layers.KDA, layer.op)
    inputs = (cast(nn.Linear, p) for p in (op.q_proj, op.k_proj, op.v_proj, op.b_proj))
    projected, launches = projection(layer, work, merged(*inputs, *extra))
    convolution = ring(work, *(cast(ShortConvolution, c) for c in (op.q_conv1d, op.k_conv1d, op.v_conv1d)))
    state = work.zeros(op.heads, op.value_dim, op.key_dim, dtype=torch.float32)
    output = read_out(work, op.heads, op.value_dim, op.o_norm.weight)
    launches.append(partial(step, projected, convolution, gates, state, work.position, output))
    weight = widened(op.o_proj.weight.detach(), op.heads, op.value_dim)
    launches += residual(work, output.mixed, weight, Norm(op.o_norm.eps, squares=output.squares))
    return Chain(layer.kind, launches, {"conv": convolution.ring, "recurrent": state})


def _gla(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.GLA, layer.op)
    down, up = cast(nn.Linear, op.gk_proj[0]), cast(nn.Linear, op.gk_proj[1])
    projected, launches = projection(layer, work, merged(op.q_proj, op.k_proj, op.v_proj, op.g_proj, down))
    decay = Decay(up.weight.detach(), up.bias.detach(), op.gate_normalizer)
    state = work.zeros(op.heads, op.value_dim, op.key_dim, dtype=torch.float32)
    norm = op.g_norm_swish_gate
    output = read_out(work, op.heads, op.value_dim, norm.weight)
    launches.append(partial(work.kernels.gla, projected, decay, state, output))
    weight = widened(op.o_proj.weight.detach(), op.heads, op.value_dim)
    launches += residual(work, output.mixed, weight, Norm(norm.eps, squares=output.squares))
    return Chain(layer.kind, launches, {"recurrent": state})


def _hgrn2(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.HGRN2, layer.op)
    projected, launches = projection(layer, work, merged(op.q_proj, op.f_proj, op.i_proj))
    state = work.zeros(op.heads, op.head_dim, op.head_dim, dtype=torch.float32)
    output = read_out(work, op.heads, op.head_dim, op.g_norm.weight, groups=1)
    launches.append(partial(work.kernels.hgrn2, projected, state, output))
    weight = widened(op.o_proj.weight.detach(), op.heads, op.head_dim)
    launches += residual(work, output.mixed, weight, Norm(op.g_norm.eps, squares=output.squares))
    return Chain(layer.kind, launches, {"recurrent": state})


def _mamba(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.Mamba, layer.op)
    projected, launches = projection(layer, work, op.in_proj.weight.detach())
    convolution, steps = ring(work, op.conv1d), op.dt_proj
    channels = Selective(*(t.detach() for t in (steps.weight, steps.bias, op.rates().float(), op.D)))
    state = work.zeros(op.inner, op.state_size, dtype=torch.float32)
    convolved, mixed = work.activations("convolved", op.inner), work.activations("mixed", op.inner)
    selected, down = work.activations("selected", op.x_proj.out_features), op.x_proj.weight.detach()
    select = partial(work.kernels.selective_project, projected, convolution, work.position, down, convolved, selected)
    step = partial(work.kernels.selective_step, projected, convolved, selected, channels, state, mixed)
    launches += [select, step, *residual(work, mixed, op.out_proj.weight)]
    return Chain(layer.kind, launches, {"conv": convolution.ring, "recurrent": state})


def _mamba2(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.Mamba2, layer.op)
    projected, launches = projection(layer, work, op.in_proj.weight.detach())
    convolution = ring(work, op.conv1d)
    value_dim = op.inner // op.heads
    parts = -(-value_dim // value_rows(work.batch, op.heads, value_dim))
    squares = work.squares(op.groups, op.heads // op.groups * parts)
    output = Output(work.activations("mixed", op.inner), squares, op.norm.weight.detach())
    rates = Rates(-op.A_log.detach().float().exp(), op.dt_bias.detach().float(), op.D.detach().float())
    state = work.zeros(op.heads, value_dim, op.state_size, dtype=torch.float32)
    step = partial(work.kernels.ssd, projected, convolution, rates, state, work.position, op.groups, output)
    norm = Norm(op.norm.eps, squares=squares)
    launches += [step, *residual(work, output.mixed, op.out_proj.weight, norm)]
    return Chain(layer.kind, launches, {"conv": convolution.ring, "recurrent": state})


def _rwkv7(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.RWKV7, layer.op)
    (w_down, w_up), (a_down, a_up), (g_down, g_up) = (part.lora[::2] for part in (op.w_lora, op.a_lora, op.g_lora))
    inputs = {"r": op.r_proj, "k": op.k_proj, "v": op.v_proj, "w": w_down, "a": a_down, "g": g_down}
    # each input begins a new block of rows, since it has a mix of its own
    weights = [F.pad(p.weight.detach(), (0, 0, 0, -p.out_features % BLOCK)) for p in inputs.values()]
    starts = (0, *itertools.accumulate(len(weight) for weight in weights[:-1]))
    mixes = torch.stack([op.get_parameter(f"x_{name}").detach() for name in inputs])
    blocks = torch.tensor([len(weight) // BLOCK for weight in weights], device=mixes.device)
    block_mix = torch.arange(len(inputs), device=mixes.device, dtype=torch.int32).repeat_interleave(blocks)
    weight, shift = torch.cat(weights).contiguous(), Shift(mixes, block_mix, work.zeros(2, mixes.shape[1]))
    projected = work.activations("projected", len(weight))
    vectors = (w_up.bias, a_up.bias, op.k_k, op.k_a, op.r_k, op.g_norm.weight, op.g_norm.bias)
    ups = (up.weight.detach() for up in (w_up, a_up, g_up))
    mix = TimeMix(*ups, *(vector.detach() for vector in vectors), STRONGEST, op.norm_eps, starts)
    state = work.zeros(op.heads, op.head_dim, op.head_dim, dtype=torch.float32)
    mixed, norm = work.activations("mixed", op.o_proj.in_features), layer.norm
    shifted = partial(work.kernels.shift, work.hidden, norm.weight.detach(), norm.eps, shift, work.position)
    step = partial(work.kernels.rwkv7, projected, mix, state, mixed)
    launches = [partial(shifted, weight, projected), step, *residual(work, mixed, op.o_proj.weight)]
    return Chain(layer.kind, launches, {"conv": shift.ring, "recurrent": state})


CHAINS: dict[type, Callable[[Residual, Workspace], Chain]] = {
    layers.FFN: _ffn,
    layers.Attention: _attention,
    layers.SlidingWindowAttention: _attention,
    layers.DeltaNet: _delta,
    layers.GatedDeltaNet: _gated_delta,
    layers.KDA: _kda,
    layers.GLA: _gla,
    layers.HGRN2: _hgrn2,
    layers.Mamba: _mamba,
    layers.Mamba2: _mamba2,
    layers.RWKV7: _rwkv7,
}
