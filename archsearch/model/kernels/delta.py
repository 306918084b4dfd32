"""One decode step of the delta rule, with gates (Gated DeltaNet) or without (DeltaNet), in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, silu, softplus, wait
from archsearch.model.kernels.convolution import Convolution, Output, convolve, emit, padded, past, present


@dataclass(frozen=True, slots=True)
class DeltaGates:
    """What Gated DeltaNet has beyond DeltaNet.

    Attributes:
        rates: [heads] in fp32, -exp(A_log).
        steps: [heads] in fp32, dt_bias.
    """

    rates: Tensor
    steps: Tensor


@triton.jit
def delta_kernel(projected, ring, weight, rates, steps, gain, state, position, mixed, squares,
                 width, heads, K: tl.constexpr, V: tl.constexpr, K_BLOCK: tl.constexpr,
                 V_BLOCK: tl.constexpr, V_PADDED: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """Delta rule, gated or not. ``projected`` holds q, k, v, b and, gated, a and g."""
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
    q = present(q, new_q, ring, weight, weight, q_at, in_k, here, part == 0, channels, TAPS, False)
    k = present(k, new_k, ring, weight, weight, k_at, in_k, here, part == 0, channels, TAPS, False)
    v = present(v, new_v, ring, weight, weight, v_at, in_v, here, True, channels, TAPS, False)
    q *= tl.rsqrt(tl.sum(q * q) + 1e-6) * (K**-0.5)
    k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
    if GATED:
        step = softplus(tl.load(x + channels + heads + head).to(tl.float32) + tl.load(steps + head))
        s *= tl.exp(tl.load(rates + head) * step)
    error = v - tl.sum(s * k[None, :], 1)
    s += (beta * error)[:, None] * k[None, :]
    tl.store(cell, s, mask=inside)
    o = tl.sum(s * q[None, :], 1)
    tl.store(squares + (sequence * heads + head) * tl.num_programs(0) + part, tl.sum(o * o) / V)
    o *= gains
    if GATED:
        o *= silu(tl.load(x + channels + 2 * heads + head * V + value, mask=in_v, other=0.0).to(tl.float32))
    address = mixed + (sequence * heads + head) * V_PADDED + value
    tl.store(address, o.to(mixed.dtype.element_ty), mask=value < V_PADDED)


def delta_step(projected: Tensor, convolution: Convolution, gates: DeltaGates | None, state: Tensor, position: Tensor,
               output: Output) -> None:  # fmt: skip
    """One step: convolution, SiLU, L2 norms of q and k, gates, update of the state, read-out, gain, output gate.

    Args:
        projected: [B, width], q, k, v, b side by side, and with ``gates`` a and g.
        convolution: over the channels of q, k and v.
        gates: None for DeltaNet.
        state: [B, heads, V, K] in fp32, changed in place.
        position: [] in int64, tokens before this one.
        output: where the read-out goes.
    """
    batch, heads, v, k = state.shape
    rows = output.mixed.shape[1] // heads // output.squares.shape[2]
    rates, steps = (state, state) if gates is None else (gates.rates, gates.steps)
    sizes = {"width": projected.shape[1], "heads": heads, "K": k, "V": v, "K_BLOCK": power_of_two(k), "V_BLOCK": rows,
             "V_PADDED": padded(v), "TAPS": len(convolution.weight), "GATED": gates is not None}  # fmt: skip
    launch(delta_kernel, (output.squares.shape[2], heads, batch), state, projected, convolution.ring,
           convolution.weight, rates, steps, output.gain, state, position, output.mixed, output.squares, **sizes,
           warps=4)  # fmt: skip


def delta_step_reference(projected: Tensor, convolution: Convolution, gates: DeltaGates | None, state: Tensor,
                         position: Tensor, output: Output) -> None:  # fmt: skip
    """``delta_step`` in plain torch."""
    _, heads, v, k = state.shape
    widths = [heads * (2 * k + v), heads] + ([heads, heads * v] if gates else [])
    channels, beta, *rest = projected.split(widths, dim=-1)
    convolved = convolve(convolution, channels, position).split([heads * k, heads * k, heads * v], dim=-1)
    q, key, value = (t.unflatten(-1, (heads, -1)) for t in convolved)
    q, key = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, key))
    s = state
    if gates is not None:
        s = s * (gates.rates * F.softplus(rest[0].float() + gates.steps)).exp()[..., None, None]
    error = value - (s @ key[..., None])[..., 0]
    state.copy_(s + (beta.float().sigmoid()[..., None] * error)[..., None] * key[..., None, :])
    gate = rest[1].unflatten(-1, (heads, -1)) if gates is not None else None
    emit(output, (state @ q[..., None])[..., 0] * k**-0.5, gate)
