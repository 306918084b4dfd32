"""One decode step of Mamba, the first, in two kernels: its time steps, B and C need all convolved channels at once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, silu, softplus, wait
from archsearch.model.kernels.convolution import Convolution, convolve, past, present
from archsearch.model.kernels.low_rank import apply_low_rank, load_low, load_low_rank

ROWS, COLUMNS, CHANNELS = 4, 1024, 16
"""Rows of the selective projection and columns a tile of the first kernel; channels a program of the second."""


@dataclass(frozen=True, slots=True)
class Selective:
    """What a channel of Mamba has.

    Attributes:
        steps: [inner, rank], the second half of the time steps' projection.
        step_bias: [inner].
        rates: [inner, state] in fp32, -exp(A_log).
        skips: [inner], D.
    """

    steps: Tensor
    step_bias: Tensor
    rates: Tensor
    skips: Tensor


@triton.jit
def select_kernel(projected, ring, weight, bias, position, down, convolved, selected, N, INNER: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ROWS of ``down @ silu(convolution)`` for one sequence; the first program keeps the convolved channels."""
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = tl.load(position, cache_modifier=".cg")
    ring += sequence * TAPS * INNER
    first = tl.program_id(0) == 0
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    wait(PDL)
    for start in tl.range(0, INNER, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        inside = channel < INNER
        mask = (row[:, None] < N) & inside[None, :]
        tile = tl.load(down + row[:, None].to(tl.int64) * INNER + channel[None, :], mask=mask, other=0.0)
        x = past(ring, weight, channel, inside, here, INNER, TAPS)
        new = tl.load(projected + sequence * 2 * INNER + channel, mask=inside, other=0.0)
        x = present(x, new, ring, weight, bias, channel, inside, here, first, INNER, TAPS, True)
        x = tl.where(inside, x, 0.0)
        tl.store(convolved + sequence * INNER + channel, x.to(convolved.dtype.element_ty), mask=inside & first)
        total += tile.to(tl.float32) * x[None, :]
    tl.store(selected + sequence * N + row, tl.sum(total, 1).to(selected.dtype.element_ty), mask=row < N)


@triton.jit
def scan_kernel(projected, convolved, selected, steps, step_bias, rates, skips, state, mixed, INNER: tl.constexpr,
                RANK: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """CHANNELS channels of one sequence."""
    sequence = tl.program_id(1)
    channel, key = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, K_BLOCK)
    inside, in_k = channel < INNER, key < K
    both = inside[:, None] & in_k[None, :]
    cell = state + sequence.to(tl.int64) * INNER * K + channel[:, None] * K + key[None, :]
    s = tl.load(cell, mask=both, other=0.0, cache_modifier=".cg")
    rate = tl.load(rates + channel[:, None] * K + key[None, :], mask=both, other=0.0)
    ups = load_low_rank(steps, channel, inside, RANK)
    offset = tl.load(step_bias + channel, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(skips + channel, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)

    own = selected + sequence * (RANK + 2 * K)
    x = tl.load(convolved + sequence * INNER + channel, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(projected + sequence * 2 * INNER + INNER + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(own + RANK + key, mask=in_k, other=0.0).to(tl.float32)
    c = tl.load(own + RANK + K + key, mask=in_k, other=0.0).to(tl.float32)
    dt = softplus(apply_low_rank(ups, load_low(own, RANK), CHANNELS) + offset)
    s = s * tl.exp(dt[:, None] * rate) + (dt * x)[:, None] * b[None, :]
    tl.store(cell, s, mask=both)
    o = (tl.sum(s * c[None, :], 1) + skip * x) * silu(z)
    tl.store(mixed + sequence * INNER + channel, o.to(mixed.dtype.element_ty), mask=inside)


def selective_project(projected: Tensor, convolution: Convolution, position: Tensor, down: Tensor, convolved: Tensor,
                      selected: Tensor) -> None:  # fmt: skip
    """Convolution, SiLU, and the projection of all channels to the time steps' low rank, B and C.

    Args:
        projected: [B, 2 inner], x and z side by side.
        convolution: over the channels of x.
        position: [] in int64, tokens before this one.
        down: [rank + 2 state, inner].
        convolved: [B, inner], written.
        selected: [B, rank + 2 state], written.
    """
    (batch, inner), rows = convolved.shape, len(down)
    sizes = {"INNER": inner, "ROWS": ROWS, "COLUMNS": min(COLUMNS, power_of_two(inner)),
             "TAPS": len(convolution.weight)}  # fmt: skip
    launch(select_kernel, (triton.cdiv(rows, ROWS), batch), projected, projected, convolution.ring,
           convolution.weight, convolution.bias, position, down, convolved, selected, rows, **sizes,
           warps=4)  # fmt: skip


def selective_step(projected: Tensor, convolved: Tensor, selected: Tensor, channels: Selective, state: Tensor,
                   mixed: Tensor) -> None:  # fmt: skip
    """One step: time steps, update of the state, read-out, skip, gate.

    Args:
        projected: [B, 2 inner], x and z side by side.
        convolved: [B, inner], from ``selective_project``.
        selected: [B, rank + 2 state], likewise.
        channels: what each channel has.
        state: [B, inner, state] in fp32, changed in place.
        mixed: [B, inner], written.
    """
    batch, inner, k = state.shape
    sizes = {"INNER": inner, "RANK": channels.steps.shape[1], "K": k, "K_BLOCK": power_of_two(k), "CHANNELS": CHANNELS}
    launch(scan_kernel, (triton.cdiv(inner, CHANNELS), batch), state, projected, convolved, selected, channels.steps,
           channels.step_bias, channels.rates, channels.skips, state, mixed, **sizes, warps=4)  # fmt: skip


def selective_project_reference(projected: Tensor, convolution: Convolution, position: Tensor, down: Tensor,
                                convolved: Tensor, selected: Tensor) -> None:  # fmt: skip
    """``selective_project`` in plain torch."""
    x = convolve(convolution, projected[:, : convolved.shape[1]], position)
    convolved.copy_(x)
    selected.copy_(F.linear(x, down.float()))


def selective_step_reference(projected: Tensor, convolved: Tensor, selected: Tensor, channels: Selective,
                             state: Tensor, mixed: Tensor) -> None:  # fmt: skip
    """``selective_step`` in plain torch."""
    _, inner, k = state.shape
    low, b, c = selected.float().split([selected.shape[1] - 2 * k, k, k], dim=-1)
    dt = F.softplus(F.linear(low, channels.steps.float(), channels.step_bias.float()))
    x, z = convolved.float(), projected[:, inner:].float()
    state.copy_(state * (dt[..., None] * channels.rates).exp() + (dt * x)[..., None] * b[:, None])
    o = (state @ c[..., None])[..., 0] + channels.skips.float() * x
    mixed.copy_(o * F.silu(z))
