"""How each operator kind decodes one token: merged weights, static state, and a chain of launches.

All mixers take three kernels (norm and input projections; everything between; output projection and residual)
and an FFN two, so that no kind is slow only because it is fused less than another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.model import layers
from archsearch.model.hybrid import Residual
from archsearch.model.kernels import Kernels
from archsearch.model.kernels.attention import Heads, attention_scratch, rotary_table
from archsearch.model.kernels.convolution import Convolution, Output, padded, value_rows
from archsearch.model.kernels.delta import DeltaGates
from archsearch.model.kernels.gla import Decay
from archsearch.model.kernels.projection import Epilogue, Norm
from archsearch.model.kernels.ssd import Rates
from archsearch.model.layers.parts import RMSNorm, ShortConvolution

Launches = list[Callable[[], None]]


@dataclass(slots=True)
class Workspace:
    """What the chains of all layers share. Activations live in buffers that are used again by every layer.

    Attributes:
        kernels: who computes.
        batch: number of sequences.
        capacity: tokens that fit, meta tokens included.
        hidden: [B, hidden], the residual stream.
        position: [] in int64, tokens stored so far.
    """

    kernels: Kernels
    batch: int
    capacity: int
    hidden: Tensor
    position: Tensor
    _buffers: dict[tuple, Tensor] = field(default_factory=dict)
    _scratch: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    def activations(self, name: str, width: int) -> Tensor:
        """The buffer [B, width] of that name."""
        key = name, width
        if key not in self._buffers:
            self._buffers[key] = self.hidden.new_empty(self.batch, width)
        return self._buffers[key]

    def squares(self, groups: int, parts: int) -> Tensor:
        """The buffer [B, groups, parts] of mean squares."""
        key = "squares", groups, parts
        if key not in self._buffers:
            self._buffers[key] = self.hidden.new_empty(self.batch, groups, parts, dtype=torch.float32)
        return self._buffers[key]

    def scratch(self, heads: Heads, slots: int) -> dict[str, Tensor]:
        """What the splits of an attention step share."""
        key = heads, slots
        if key not in self._scratch:
            self._scratch[key] = attention_scratch(self.batch, heads, slots, self.hidden.device)
        return self._scratch[key]

    def rotary(self, dim: int, theta: float) -> Tensor:
        """The rotary embedding's table."""
        key = "rotary", dim, theta
        if key not in self._buffers:
            self._buffers[key] = rotary_table(self.capacity, dim, theta, self.hidden.device)
        return self._buffers[key]

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A state buffer of ``batch`` sequences."""
        return self.hidden.new_zeros(self.batch, *shape, dtype=dtype)


@dataclass(slots=True)
class Chain:
    """One layer's decode step.

    Attributes:
        kind: of the operator.
        launches: its kernels in order.
        state: under the names of ``Layer.allocate_state``; convolutions are rings.
    """

    kind: str
    launches: Launches
    state: dict[str, Tensor] = field(default_factory=dict)


def build_chain(layer: Residual, work: Workspace) -> Chain:
    """The decode step of one residual layer."""
    return CHAINS[type(layer.op)](layer, work)


def _gain(norm: RMSNorm) -> Norm:
    return Norm(norm.eps, gain=norm.weight.detach())


def _merged(*projections: nn.Linear) -> Tensor:
    return torch.cat([p.weight.detach() for p in projections]).contiguous()


def _projection(
    layer: Residual, work: Workspace, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Launches]:
    """Norm and input projections of a layer: their output, and the launch."""
    projected = work.activations("projected", len(weight))
    norm = _gain(layer.norm)
    return projected, [partial(work.kernels.project, work.hidden, weight, projected, Epilogue.PLAIN, norm, bias)]


def _residual(work: Workspace, x: Tensor, weight: Tensor, norm: Norm | None = None) -> Launches:
    """Output projection of a layer, added to the residual stream."""
    return [partial(work.kernels.project, x, weight.detach(), work.hidden, Epilogue.RESIDUAL, norm)]


def _ffn(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.FFN, layer.op)
    inner = work.activations("projected", op.down_proj.in_features)
    weight, norm = _merged(op.gate_proj, op.up_proj), _gain(layer.norm)
    gated = partial(work.kernels.project, work.hidden, weight, inner, Epilogue.GATED, norm)
    return Chain(layer.kind, [gated, *_residual(work, inner, op.down_proj.weight)])


def _attention(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.Attention, layer.op)
    qkv = op.q_proj, op.k_proj, op.v_proj
    bias = None if op.q_proj.bias is None else torch.cat([p.bias.detach() for p in qkv])
    projected, launches = _projection(layer, work, _merged(*qkv), bias)
    norms, eps = None, 0.0
    if op.q_norm is not None and op.k_norm is not None:
        norms, eps = (op.q_norm.weight.detach(), op.k_norm.weight.detach()), op.q_norm.eps
    heads = Heads(op.heads, op.kv_heads, op.head_dim, eps, isinstance(op, layers.SlidingWindowAttention))
    slots, rotary = op.visible(work.capacity), work.rotary(op.head_dim, op.theta)
    state = {name: work.zeros(op.kv_heads, slots, op.head_dim).normal_() for name in ("k", "v")}
    mixed = work.activations("mixed", op.heads * op.head_dim)
    scratch = work.scratch(heads, slots)
    step = partial(work.kernels.attend, projected, norms, rotary, work.position, state["k"], state["v"], scratch)
    launches += [partial(step, mixed, heads), *_residual(work, mixed, op.o_proj.weight)]
    return Chain(layer.kind, launches, state)


def _ring(work: Workspace, *parts: ShortConvolution) -> Convolution:
    weight = torch.cat([p.weight.detach()[:, 0] for p in parts])
    bias = None if parts[0].bias is None else parts[0].bias.detach()
    return Convolution(weight.T.contiguous(), bias, work.zeros(weight.shape[1], weight.shape[0]))


def _read_out(work: Workspace, heads: int, value_dim: int, gain: Tensor) -> Output:
    """Where a mixer with one output norm a head writes."""
    width = padded(value_dim)
    parts = width // min(width, value_rows(work.batch, heads, value_dim))
    return Output(work.activations("mixed", heads * width), work.squares(heads, parts), gain.detach())


def _widened(weight: Tensor, heads: int, value_dim: int) -> Tensor:
    """An output projection [N, heads * value dim] for heads that are padded with zeros."""
    extra = padded(value_dim) - value_dim
    return weight if extra == 0 else F.pad(weight.unflatten(1, (heads, -1)), (0, extra)).flatten(1).contiguous()


def _delta(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.DeltaNet, layer.op)
    merged, gates = [cast(nn.Linear, p) for p in (op.q_proj, op.k_proj, op.v_proj, op.b_proj)], None
    if isinstance(op, layers.GatedDeltaNet):
        merged += [op.a_proj, op.g_proj]
        gates = DeltaGates(-op.A_log.detach().float().exp(), op.dt_bias.detach().float())
    projected, launches = _projection(layer, work, _merged(*merged))
    convolution = _ring(work, *(cast(ShortConvolution, c) for c in (op.q_conv1d, op.k_conv1d, op.v_conv1d)))
    state = work.zeros(op.heads, op.value_dim, op.key_dim, dtype=torch.float32)
    output = _read_out(work, op.heads, op.value_dim, op.o_norm.weight)
    launches.append(partial(work.kernels.delta, projected, convolution, gates, state, work.position, output))
    weight = _widened(op.o_proj.weight.detach(), op.heads, op.value_dim)
    launches += _residual(work, output.mixed, weight, Norm(op.o_norm.eps, squares=output.squares))
    return Chain(layer.kind, launches, {"conv": convolution.ring, "recurrent": state})


def _gla(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.GLA, layer.op)
    down, up = cast(nn.Linear, op.gk_proj[0]), cast(nn.Linear, op.gk_proj[1])
    projected, launches = _projection(layer, work, _merged(op.q_proj, op.k_proj, op.v_proj, op.g_proj, down))
    decay = Decay(up.weight.detach(), up.bias.detach(), op.gate_normalizer)
    state = work.zeros(op.heads, op.value_dim, op.key_dim, dtype=torch.float32)
    norm = op.g_norm_swish_gate
    output = _read_out(work, op.heads, op.value_dim, norm.weight)
    launches.append(partial(work.kernels.gla, projected, decay, state, output))
    weight = _widened(op.o_proj.weight.detach(), op.heads, op.value_dim)
    launches += _residual(work, output.mixed, weight, Norm(norm.eps, squares=output.squares))
    return Chain(layer.kind, launches, {"recurrent": state})


def _mamba2(layer: Residual, work: Workspace) -> Chain:
    op = cast(layers.Mamba2, layer.op)
    projected, launches = _projection(layer, work, op.in_proj.weight.detach())
    convolution = _ring(work, op.conv1d)
    value_dim = op.inner // op.heads
    parts = -(-value_dim // value_rows(work.batch, op.heads, value_dim))
    squares = work.squares(op.groups, op.heads // op.groups * parts)
    output = Output(work.activations("mixed", op.inner), squares, op.norm.weight.detach())
    rates = Rates(-op.A_log.detach().float().exp(), op.dt_bias.detach().float(), op.D.detach().float())
    state = work.zeros(op.heads, value_dim, op.state_size, dtype=torch.float32)
    step = partial(work.kernels.ssd, projected, convolution, rates, state, work.position, op.groups, output)
    norm = Norm(op.norm.eps, squares=squares)
    launches += [step, *_residual(work, output.mixed, op.out_proj.weight, norm)]
    return Chain(layer.kind, launches, {"conv": convolution.ring, "recurrent": state})


CHAINS: dict[type, Callable[[Residual, Workspace], Chain]] = {
    layers.FFN: _ffn,
    layers.Attention: _attention,
    layers.SlidingWindowAttention: _attention,
    layers.DeltaNet: _delta,
    layers.GatedDeltaNet: _delta,
    layers.GLA: _gla,
    layers.Mamba2: _mamba2,
}
