"""The short causal convolution of linear mixers with all that surrounds it: SiLU, heads, L2 norm.

Reads a merged projection and writes up to three parts of it (queries, keys, values) as tensors of their
own, in one kernel forward and one backward. The backward pass computes the activations again: they are
cheaper than their memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE = 1024
"""Numbers that a program holds at a time: more do not fit its registers."""

STEPS = 8
L2_EPS = 1e-6


def convolve_reference(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> list[Tensor]:
    """Convolution over time, SiLU, then for the first ``normed`` parts an L2 norm of each head.

    Args:
        x: [B, T, channels], the parts side by side; for the kernel it may be a slice of a wider tensor.
        weights: [channels of the part, 1, taps] of each of three parts.
        biases: [channels of the part] of each; none when absent.
        dims: width of a head of each part.
        normed: how many of the parts are normalised.

    Returns:
        Each part as [B, T, heads, dim].
    """
    weight, bias = torch.cat(weights).to(x.dtype), None if biases is None else torch.cat(biases).to(x.dtype)
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    y = F.silu(F.conv1d(padded, weight, bias, groups=len(weight))).mT
    parts = [t.unflatten(-1, (-1, dim)) for t, dim in zip(y.split([len(w) for w in weights], -1), dims, strict=True)]
    scale = [(t.float().square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for t in parts[:normed]]
    return [(t * s).to(t.dtype) for t, s in zip(parts, scale, strict=False)] + parts[normed:]


def convolve(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> list[Tensor]:
    """``convolve_reference`` by a kernel."""
    return convolve_within(x, 0, weights, biases, dims, normed)[0]


def convolve_within(
    x: Tensor, start: int, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``convolve`` of the columns of a wider projection from ``start`` on; what is before and behind them is handed on.

    Gradients of all columns then go into one tensor as they are computed: split, they would be joined afterwards.
    """
    *parts, before, behind = _Convolve.apply(x, *weights, *(biases or [None] * 3), dims, normed, start)
    return parts, before, behind


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *parameters, dims, normed, start = rest
        if merged.stride(-1) != 1 or merged.stride(0) != merged.shape[1] * merged.stride(1):
            merged = merged.contiguous()
        widths = [len(weight) for weight in parameters[:3]]
        ctx.start, ctx.columns = start, merged.shape[-1]
        before, x, behind = merged.tensor_split([start, start + sum(widths)], dim=-1)
        # tap by tap, so that neighbouring lanes read neighbouring numbers
        weight = torch.cat([t.flatten(1) for t in parameters[:3]]).T.contiguous()
        bias = None if parameters[3] is None else torch.cat(parameters[3:])
        ctx.save_for_backward(x, weight, bias)
        ctx.widths, ctx.dims, ctx.normed = widths, dims, normed
        out = [x.new_empty(*x.shape[:2], width // dim, dim) for width, dim in zip(widths, dims, strict=True)]
        grid, sizes = _launch(x, weight, bias, out, normed)
        _forward[grid](x, weight, weight if bias is None else bias, *out, x.shape[1], x.stride(1), x.shape[-1], **sizes)
        return *out, before, behind

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        *grads, d_before, d_behind = grads
        grads = [grad.contiguous() for grad in grads]
        grid, sizes = _launch(x, weight, bias, grads, ctx.normed)
        taps, channels = weight.shape
        inner, d_merged = x.new_empty(x.shape), x.new_empty(*x.shape[:2], ctx.columns)
        to_before, dx, to_behind = d_merged.tensor_split([ctx.start, ctx.start + channels], dim=-1)
        to_before.copy_(d_before)
        to_behind.copy_(d_behind)
        lengths = x.shape[1], x.stride(1), channels
        _activation_backward[grid](x, weight, weight if bias is None else bias, *grads, inner, *lengths, **sizes)
        # a row of blocks each, added up below: no atomics, so the same inputs give the same bits
        partial = x.new_empty(grid[0] * grid[2], taps + 1, channels, dtype=torch.float32)
        _convolution_backward[grid](x, weight, inner, dx, partial, *lengths, ctx.columns, **sizes)
        found = partial.sum(0).split(ctx.widths, dim=-1)
        d_weights = [t[:-1].T[:, None].to(weight.dtype) for t in found]
        d_biases = [None] * 3 if bias is None else [t[-1].to(bias.dtype) for t in found]
        return d_merged, *d_weights, *d_biases, None, None, None


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Tensor], normed: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and sizes: a program takes ``STEPS`` times ``ROWS`` tokens of one head."""
    heads, dims = [t.shape[2] for t in parts], [t.shape[3] for t in parts]
    sizes: dict[str, Any] = {f"H{i}": n for i, n in enumerate(heads)} | {f"D{i}": n for i, n in enumerate(dims)}
    block = triton.next_power_of_2(max(dims))
    rows = max(1, TILE // block)
    sizes |= {"BLOCK": block, "ROWS": rows, "NORMED": sum(heads[:normed]), "EPS": L2_EPS, "num_warps": 4}
    steps = min(STEPS, triton.cdiv(x.shape[1], rows))
    sizes |= {"STEPS": steps, "TAPS": len(weight), "BIAS": bias is not None}
    return (triton.cdiv(x.shape[1], steps * rows), sum(heads), x.shape[0]), sizes


@triton.jit
def _activated(x, weight, bias, t, lane, dim, length, stride, channels, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """The convolution's outputs before SiLU at tokens ``t`` [ROWS, 1] of the head that the pointers name."""
    # weights are read for every token of the tile: one row of them would have to change its place among the threads
    inside, column = lane < dim, lane + 0 * t
    y = tl.zeros(column.shape, dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        s = t + (tap - TAPS + 1)
        value = tl.load(x + s * stride + lane, mask=inside & (s >= 0) & (s < length), other=0.0).to(tl.float32)
        y += value * tl.load(weight + tap * channels + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _forward(
    x, weight, bias, y0, y1, y2, length, stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)[None, :]
    if head < H0:
        dim, at, start = D0, head * D0, 0
        to, width = y0 + first * H0 * D0, H0 * D0
    elif head < H0 + H1:
        dim, at, start = D1, (head - H0) * D1, H0 * D0
        to, width = y1 + first * H1 * D1, H1 * D1
    else:
        dim, at, start = D2, (head - H0 - H1) * D2, H0 * D0 + H1 * D1
        to, width = y2 + first * H2 * D2, H2 * D2
    channel = start + at
    here, weight, bias, to = x + first * stride + channel, weight + channel, bias + channel, to + at
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        y = _activated(here, weight, bias, t, lane, dim, length, stride, channels, TAPS, BIAS)
        y = y * tl.sigmoid(y)
        if head < NORMED:
            y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        tl.store(to + t * width + lane, y.to(y0.dtype.element_ty), mask=(t < length) & (lane < dim))


@triton.jit
def _activation_backward(
    x, weight, bias, g0, g1, g2, inner, length, stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient between convolution and SiLU, back through norm and SiLU: ``inner`` [B, T, channels]."""
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)[None, :]
    if head < H0:
        dim, at, start = D0, head * D0, 0
        grad, width = g0 + first * H0 * D0, H0 * D0
    elif head < H0 + H1:
        dim, at, start = D1, (head - H0) * D1, H0 * D0
        grad, width = g1 + first * H1 * D1, H1 * D1
    else:
        dim, at, start = D2, (head - H0 - H1) * D2, H0 * D0 + H1 * D1
        grad, width = g2 + first * H2 * D2, H2 * D2
    channel = start + at
    here, weight, bias, grad = x + first * stride + channel, weight + channel, bias + channel, grad + at
    to = inner + first * channels + channel
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (t < length) & (lane < dim)
        y = _activated(here, weight, bias, t, lane, dim, length, stride, channels, TAPS, BIAS)
        sigmoid = tl.sigmoid(y)
        d = tl.load(grad + t * width + lane, mask=inside, other=0.0).to(tl.float32)
        if head < NORMED:
            z = y * sigmoid
            scale = tl.rsqrt(tl.sum(z * z, 1) + EPS)[:, None]
            z *= scale
            d = scale * (d - z * tl.sum(d * z, 1)[:, None])
        d *= sigmoid * (1 + y * (1 - sigmoid))
        tl.store(to + t * channels + lane, d.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _convolution_backward(
    x, weight, inner, dx, partial, length, stride, channels, dx_stride,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, and of weights and biases as sums over this program's tokens: ``partial``
    [programs, TAPS + 1, channels].
    """
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)[None, :]
    if head < H0:
        dim, channel = D0, head * D0
    elif head < H0 + H1:
        dim, channel = D1, H0 * D0 + (head - H0) * D1
    else:
        dim, channel = D2, H0 * D0 + H1 * D1 + (head - H0 - H1) * D2
    weight, inner = weight + channel, inner + first * channels + channel
    here, to = x + first * stride + channel, dx + first * dx_stride + channel
    begin = tl.program_id(0) * STEPS * ROWS
    for step in range(STEPS):
        t = begin + step * ROWS + tl.arange(0, ROWS)[:, None]
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for later in tl.static_range(TAPS):
            # token s = t + later saw token t through tap TAPS - 1 - later
            s = t + later
            d = tl.load(inner + s * channels + lane, mask=(s < length) & (lane < dim), other=0.0).to(tl.float32)
            tap = weight + (TAPS - 1 - later) * channels + lane + 0 * t
            total += d * tl.load(tap, mask=lane < dim, other=0.0).to(tl.float32)
        tl.store(to + t * dx_stride + lane, total.to(dx.dtype.element_ty), mask=(t < length) & (lane < dim))
    row = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    out = partial + row.to(tl.int64) * channels * (TAPS + 1) + channel
    for later in range(TAPS):
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for step in range(STEPS):
            t = begin + step * ROWS + tl.arange(0, ROWS)[:, None]
            known = (t + later < length) & (lane < dim)
            d = tl.load(inner + (t + later) * channels + lane, mask=known, other=0.0).to(tl.float32)
            total += d * tl.load(here + t * stride + lane, mask=known, other=0.0).to(tl.float32)
        tl.store(out + (TAPS - 1 - later) * channels + lane, tl.sum(total, 0)[None, :], mask=lane < dim)
    if BIAS:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for step in range(STEPS):
            t = begin + step * ROWS + tl.arange(0, ROWS)[:, None]
            total += tl.load(inner + t * channels + lane, mask=(t < length) & (lane < dim), other=0.0).to(tl.float32)
        tl.store(out + TAPS * channels + lane, tl.sum(total, 0)[None, :], mask=lane < dim)
