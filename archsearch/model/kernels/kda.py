"""One decode step of Kimi Delta Attention (KDA) in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, softplus, wait
from archsearch.model.kernels.convolution import Convolution, Output, convolve, emit, padded, past, present
from archsearch.model.kernels.low_rank import apply_low_rank, load_low, load_low_rank


@dataclass(frozen=True, slots=True)
class KDAGates:
    """What KDA's decays and output gates are made of.

    Attributes:
        rates: [heads] in fp32, -exp(A_log).
        steps: [heads * K] in fp32, dt_bias.
        decay: [heads * K, rank], the second half of the decay's projection.
        gate: [heads * V, rank], that of the output gate's.
        gate_bias: [heads * V].
    """

    rates: Tensor
    steps: Tensor
    decay: Tensor
    gate: Tensor
    gate_bias: Tensor


@triton.jit
def kda_kernel(projected, ring, weight, rates, steps, decay_up, gate_up, gate_bias, gain, state, position, mixed,
               squares, width, heads, K: tl.constexpr, V: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
               V_PADDED: tl.constexpr, TAPS: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """KDA. ``projected`` holds q, k, v, b and the low-rank inputs of decay and output gate."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = heads * (2 * K + V)
    key, value = tl.arange(0, K_BLOCK), part * V_BLOCK + tl.arange(0, V_BLOCK)
    in_k, in_v = key < K, value < V
    q_at, k_at, v_at = head * K + key, heads * K + head * K + key, 2 * heads * K + head * V + value
    here = tl.load(position, cache_modifier=".cg")
    ring += sequence * TAPS * channels
    cell = state + (sequence * heads + head).to(tl.int64) * V * K + value[:, None] * K + key[None, :]
    inside = in_v[:, None] & in_k[None, :]
    s = tl.load(cell, mask=inside, other=0.0, cache_modifier=".cg")
    decays = load_low_rank(decay_up, head * K + key, in_k, RANK)
    gates = load_low_rank(gate_up, head * V + value, in_v, RANK)
    step = tl.load(steps + head * K + key, mask=in_k, other=0.0)
    rate = tl.load(rates + head)
    offset = tl.load(gate_bias + head * V + value, mask=in_v, other=0.0).to(tl.float32)
    q = past(ring, weight, q_at, in_k, here, channels, TAPS)
    k = past(ring, weight, k_at, in_k, here, channels, TAPS)
    v = past(ring, weight, v_at, in_v, here, channels, TAPS)
    gains = tl.load(gain + value, mask=in_v, other=0.0).to(tl.float32)
    wait(PDL)

    x = projected + sequence * width
    new_q = tl.load(x + q_at, mask=in_k, other=0.0)
    new_k = tl.load(x + k_at, mask=in_k, other=0.0)
    new_v = tl.load(x + v_at, mask=in_v, other=0.0)
    beta = tl.sigmoid(tl.load(x + channels + head).to(tl.float32))
    decay_low = load_low(x + channels + heads, RANK)
    gate_low = load_low(x + channels + heads + RANK, RANK)
    q = present(q, new_q, ring, weight, weight, q_at, in_k, here, part == 0, channels, TAPS, False)
    k = present(k, new_k, ring, weight, weight, k_at, in_k, here, part == 0, channels, TAPS, False)
    v = present(v, new_v, ring, weight, weight, v_at, in_v, here, True, channels, TAPS, False)
    q *= tl.rsqrt(tl.sum(q * q) + 1e-6) * (K**-0.5)
    k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
    decay = rate * softplus(apply_low_rank(decays, decay_low, K_BLOCK) + step)
    s *= tl.exp(decay)[None, :]
    error = v - tl.sum(s * k[None, :], 1)
    s += (beta * error)[:, None] * k[None, :]
    tl.store(cell, s, mask=inside)
    o = tl.sum(s * q[None, :], 1)
    tl.store(squares + (sequence * heads + head) * tl.num_programs(0) + part, tl.sum(o * o) / V)
    o *= gains * tl.sigmoid(apply_low_rank(gates, gate_low, V_BLOCK) + offset)
    address = mixed + (sequence * heads + head) * V_PADDED + value
    tl.store(address, o.to(mixed.dtype.element_ty), mask=value < V_PADDED)


def kda_step(projected: Tensor, convolution: Convolution, gates: KDAGates, state: Tensor, position: Tensor,
             output: Output) -> None:  # fmt: skip
    """One step: convolution, SiLU, L2 norms of q and k, decay, update of the state, read-out, gain, output gate.

    Args:
        projected: [B, width], q, k, v, b and the low-rank inputs of decay and output gate side by side.
        convolution: over the channels of q, k and v.
        gates: how decays and output gates are made.
        state: [B, heads, V, K] in fp32, changed in place.
        position: [] in int64, tokens before this one.
        output: where the read-out goes.
    """
    batch, heads, v, k = state.shape
    rows = output.mixed.shape[1] // heads // output.squares.shape[2]
    sizes = {"width": projected.shape[1], "heads": heads, "K": k, "V": v, "K_BLOCK": power_of_two(k), "V_BLOCK": rows,
             "V_PADDED": padded(v), "TAPS": len(convolution.weight), "RANK": gates.decay.shape[1]}  # fmt: skip
    launch(kda_kernel, (output.squares.shape[2], heads, batch), state, projected, convolution.ring,
           convolution.weight, gates.rates, gates.steps, gates.decay, gates.gate, gates.gate_bias, output.gain, state,
           position, output.mixed, output.squares, **sizes, warps=8)  # fmt: skip


def kda_step_reference(projected: Tensor, convolution: Convolution, gates: KDAGates, state: Tensor, position: Tensor,
                       output: Output) -> None:  # fmt: skip
    """``kda_step`` in plain torch."""
    _, heads, v, k = state.shape
    rank = gates.decay.shape[1]
    channels, beta, *low = projected.split([heads * (2 * k + v), heads, rank, rank], dim=-1)
    convolved = convolve(convolution, channels, position).split([heads * k, heads * k, heads * v], dim=-1)
    q, key, value = (t.unflatten(-1, (heads, -1)) for t in convolved)
    q, key = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, key))
    decay, gate = (F.linear(x.float(), up.float()) for x, up in zip(low, (gates.decay, gates.gate), strict=True))
    decay = gates.rates[:, None] * F.softplus(decay + gates.steps).unflatten(-1, (heads, -1))
    s = state * decay.exp()[..., None, :]
    error = value - (s @ key[..., None])[..., 0]
    state.copy_(s + (beta.float().sigmoid()[..., None] * error)[..., None] * key[..., None, :])
    gate = (gate + gates.gate_bias.float()).unflatten(-1, (heads, -1))
    emit(output, (state @ q[..., None])[..., 0] * k**-0.5, gate, torch.sigmoid)
