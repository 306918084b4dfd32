"""One decode step of Mamba-2's state-space model (SSD) in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, silu, softplus, wait
from archsearch.model.kernels.convolution import Convolution, Output, convolve, past, present


@dataclass(frozen=True, slots=True)
class Rates:
    """What Mamba-2 has a head, each [heads] in fp32: ``rates`` = -exp(A_log), ``steps`` = dt_bias, ``skips`` = D."""

    rates: Tensor
    steps: Tensor
    skips: Tensor


@triton.jit
def ssd_kernel(projected, ring, weight, bias, rates, steps, skips, gain, state, position, mixed, squares,
               width, heads, groups, K: tl.constexpr, V: tl.constexpr,
               K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Mamba-2. ``projected`` holds z, x, B, C and dt; K is its state size, V its head dim."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = heads * V
    channels = inner + 2 * groups * K
    group = head // (heads // groups)
    key, value = tl.arange(0, K_BLOCK), part * V_BLOCK + tl.arange(0, V_BLOCK)
    in_k, in_v = key < K, value < V
    x_at, b_at = head * V + value, inner + group * K + key
    c_at = b_at + groups * K
    here = tl.load(position, cache_modifier=".cg")
    ring += sequence * TAPS * channels
    cell = state + (sequence * heads + head).to(tl.int64) * V * K + value[:, None] * K + key[None, :]
    inside = in_v[:, None] & in_k[None, :]
    s = tl.load(cell, mask=inside, other=0.0, cache_modifier=".cg")
    x = past(ring, weight, x_at, in_v, here, channels, TAPS)
    b = past(ring, weight, b_at, in_k, here, channels, TAPS)
    c = past(ring, weight, c_at, in_k, here, channels, TAPS)
    gains = tl.load(gain + x_at, mask=in_v, other=0.0).to(tl.float32)
    rate, step, skip = tl.load(rates + head), tl.load(steps + head), tl.load(skips + head)
    wait(PDL)

    start = projected + sequence * width
    z = tl.load(start + x_at, mask=in_v, other=0.0).to(tl.float32)
    new_x = tl.load(start + inner + x_at, mask=in_v, other=0.0)
    new_b = tl.load(start + inner + b_at, mask=in_k, other=0.0)
    new_c = tl.load(start + inner + c_at, mask=in_k, other=0.0)
    dt = softplus(tl.load(start + inner + channels + head).to(tl.float32) + step)
    first = (part == 0) & (head % (heads // groups) == 0)
    x = present(x, new_x, ring, weight, bias, x_at, in_v, here, True, channels, TAPS, True)
    b = present(b, new_b, ring, weight, bias, b_at, in_k, here, first, channels, TAPS, True)
    c = present(c, new_c, ring, weight, bias, c_at, in_k, here, first, channels, TAPS, True)
    x = tl.where(in_v, x, 0.0)
    s = s * tl.exp(rate * dt) + (x * dt)[:, None] * b[None, :]
    tl.store(cell, s, mask=inside)
    o = (tl.sum(s * c[None, :], 1) + skip * x) * silu(z)
    parts = tl.num_programs(0)
    tl.store(squares + (sequence * heads + head) * parts + part, tl.sum(o * o) / (inner // groups))
    tl.store(mixed + sequence * inner + x_at, (o * gains).to(mixed.dtype.element_ty), mask=in_v)


def ssd_step(projected: Tensor, convolution: Convolution, rates: Rates, state: Tensor, position: Tensor, groups: int,
             output: Output) -> None:  # fmt: skip
    """One step: convolution, SiLU, update of the state, read-out, skip, gate, gain.

    Args:
        projected: [B, width], z, x, B, C and dt side by side.
        convolution: over the channels of x, B and C.
        rates: constants of the heads.
        state: [B, heads, head dim, state size] in fp32, changed in place.
        position: [] in int64, tokens before this one.
        groups: of B and C, and of the output norm.
        output: where the read-out goes.
    """
    batch, heads, v, k = state.shape
    parts = output.squares.shape[2] * groups // heads
    sizes = {"width": projected.shape[1], "heads": heads, "groups": groups, "K": k, "V": v, "K_BLOCK": power_of_two(k),
             "V_BLOCK": power_of_two(-(-v // parts)), "TAPS": len(convolution.weight)}  # fmt: skip
    launch(ssd_kernel, (parts, heads, batch), state, projected, convolution.ring, convolution.weight,
           convolution.bias, rates.rates, rates.steps, rates.skips, output.gain, state, position, output.mixed,
           output.squares, **sizes, warps=4)  # fmt: skip


def ssd_step_reference(projected: Tensor, convolution: Convolution, rates: Rates, state: Tensor, position: Tensor,
                       groups: int, output: Output) -> None:  # fmt: skip
    """``ssd_step`` in plain torch."""
    _, heads, v, k = state.shape
    inner, shared = heads * v, groups * k
    z, channels, dt = projected.split([inner, inner + 2 * shared, heads], dim=-1)
    x, b, c = convolve(convolution, channels, position).split([inner, shared, shared], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    b, c = (t.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for t in (b, c))
    dt = F.softplus(dt.float() + rates.steps)
    kept = state * (rates.rates * dt).exp()[..., None, None]
    state.copy_(kept + (x * dt[..., None])[..., None] * b[..., None, :])
    o = (state @ c[..., None])[..., 0] + rates.skips[:, None] * x
    o = o.flatten(1) * F.silu(z.float())
    output.squares.zero_()
    output.squares[..., 0] = o.unflatten(-1, (groups, -1)).square().mean(-1)
    output.mixed.copy_(o * output.gain.float())
