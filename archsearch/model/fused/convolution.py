"""The short causal convolution of linear mixers with all that surrounds it: SiLU, heads, L2 norm.

Reads a merged projection and writes up to three parts of it (queries, keys, values) as tensors of their
own, in one kernel forward and one backward. The backward pass computes the activations again: they are
cheaper than their memory. Both kernels walk along time with what the taps reach in registers, so that each
number is read once; what comes ``AHEAD`` tokens later is on its way meanwhile.
"""
# Triton does not know the unpacking of tuples
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.fused.fast_math import fast_sigmoid

TOKENS, BACKWARD_TOKENS = 64, 128
"""Tokens that a program walks through; the backward pass computes the last taps twice, and leaves sums behind."""

AHEAD = 4
"""Tokens that are loaded before their turn, to hide the memory's latency; the loops are unrolled by as many."""

LANES = 128
"""Channels of a warp: most heads are one warp's, which norms them without waiting for another."""

L2_EPS = 1e-6


def convolve_reference(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> list[Tensor]:
    """Convolution over time, SiLU, then for the first ``normed`` parts an L2 norm of each head.

    Args:
        x: [B, T, channels], the parts side by side, and perhaps more columns behind them.
        weights: [channels of the part, 1, taps] of each of three parts.
        biases: [channels of the part] of each; none when absent.
        dims: width of a head of each part.
        normed: how many of the parts are normalised.

    Returns:
        Each part as [B, T, heads, dim], and the columns behind them as they are [B, T, columns].
    """
    weight, bias = torch.cat(weights).to(x.dtype), None if biases is None else torch.cat(biases).to(x.dtype)
    x, behind = x.split([len(weight), x.shape[-1] - len(weight)], dim=-1)
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    y = F.silu(F.conv1d(padded, weight, bias, groups=len(weight))).mT
    parts = [t.unflatten(-1, (-1, dim)) for t, dim in zip(y.split([len(w) for w in weights], -1), dims, strict=True)]
    scale = [(t.float().square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for t in parts[:normed]]
    return [(t * s).to(t.dtype) for t, s in zip(parts, scale, strict=False)] + parts[normed:] + [behind]


def convolve(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> list[Tensor]:
    """``convolve_reference`` by a kernel; ``x`` may be a slice of a wider projection."""
    parts, _, behind = convolve_within(x, 0, weights, biases, dims, normed)
    return [*parts, behind]


def convolve_within(
    x: Tensor, start: int, weights: list[Tensor], biases: list[Tensor] | None, dims: list[int], normed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``convolve`` of the columns from ``start`` on: the parts, and the columns before and behind them.

    Gradients of all columns are then written into one tensor as they are computed; those of slices would be joined
    by a pass of their own.
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
        grid, sizes = _launch(x, weight, bias, out, normed, TOKENS)
        lengths = x.shape[1], x.stride(1), sum(widths)
        _convolve_forward[grid](x, weight, weight if bias is None else bias, *out, *lengths, **sizes)
        return *out, before, behind

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        *grads, before, behind = (grad.contiguous() for grad in grads)
        grid, sizes = _launch(x, weight, bias, grads, ctx.normed, BACKWARD_TOKENS)
        taps, channels = weight.shape
        d_merged = x.new_empty(*x.shape[:2], ctx.columns)
        to_before, dx, to_behind = d_merged.tensor_split([ctx.start, ctx.start + channels], dim=-1)
        to_before.copy_(before)
        to_behind.copy_(behind)
        # a row of blocks each, added up below: no atomics, so the same inputs give the same bits
        partial = x.new_empty(grid[0] * grid[2], taps + 1, channels, dtype=torch.float32)
        lengths = x.shape[1], x.stride(1), ctx.columns, channels
        _convolve_backward[grid](x, weight, weight if bias is None else bias, *grads, dx, partial, *lengths, **sizes)
        found = partial.sum(0).split(ctx.widths, dim=-1)
        d_weights = [t[:-1].T[:, None].to(weight.dtype) for t in found]
        d_biases = [None] * 3 if bias is None else [t[-1].to(bias.dtype) for t in found]
        return d_merged, *d_weights, *d_biases, None, None, None


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Tensor], normed: int, tokens: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and sizes: a program takes ``tokens`` tokens of one head."""
    heads, dims = [t.shape[2] for t in parts], [t.shape[3] for t in parts]
    sizes: dict[str, Any] = {f"H{i}": n for i, n in enumerate(heads)} | {f"D{i}": n for i, n in enumerate(dims)}
    block = triton.next_power_of_2(max(dims))
    sizes |= {"BLOCK": block, "TOKENS": tokens, "AHEAD": AHEAD, "num_warps": max(1, block // LANES)}
    sizes |= {"NORMED": sum(heads[:normed]), "EPS": L2_EPS, "TAPS": len(weight), "BIAS": bias is not None}
    return (triton.cdiv(x.shape[1], tokens), sum(heads), x.shape[0]), sizes


@triton.jit
def _find(
    head, first, p0, p1, p2, BLOCK: tl.constexpr,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Where a head is: its channels among all, which of the lanes they fill, its place in its part from token
    ``first`` on, and how far apart tokens are there.
    """
    lane = tl.arange(0, BLOCK)
    if head < H0:
        dim, at, start, part, width = D0, head * D0, 0, p0, H0 * D0
    elif head < H0 + H1:
        dim, at, start, part, width = D1, (head - H0) * D1, H0 * D0, p1, H1 * D1
    else:
        dim, at, start, part, width = D2, (head - H0 - H1) * D2, H0 * D0 + H1 * D1, p2, H2 * D2
    return start + at + lane, lane < dim, part + first * width + at + lane, width


@triton.jit
def _convolve_forward(
    x, weight, bias, y0, y1, y2, length, stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    channel, inside, to, width = _find(head, first, y0, y1, y2, BLOCK, H0, H1, H2, D0, D1, D2)
    x += first * stride + channel
    begin = tl.program_id(0) * TOKENS
    taps, seen, xs = (), (), ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + tap * channels + channel, mask=inside, other=0.0).to(tl.float32),)
        s = begin - TAPS + tap
        seen = seen + (tl.load(x + s * stride, mask=inside & (s >= 0) & (s < length), other=0.0).to(tl.float32),)
    for ahead in tl.static_range(AHEAD):
        s = begin + ahead
        xs = xs + (tl.load(x + s * stride, mask=inside & (s < length), other=0.0),)
    offset = tl.zeros((BLOCK,), dtype=tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for t in tl.range(begin, begin + TOKENS, loop_unroll_factor=AHEAD):
        seen = seen[1:] + (xs[0].to(tl.float32),)
        s = t + AHEAD
        xs = xs[1:] + (tl.load(x + s * stride, mask=inside & (s < length), other=0.0),)
        y = offset
        for tap in tl.static_range(TAPS):
            y += taps[tap] * seen[tap]
        y *= fast_sigmoid(y)
        if head < NORMED:
            y *= tl.rsqrt(tl.sum(y * y, 0) + EPS)
        tl.store(to + t * width, y.to(y0.dtype.element_ty), mask=inside & (t < length))


@triton.jit
def _convolve_backward(
    x, weight, bias, g0, g1, g2, dx, partial, length, stride, to_stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, and of weights and biases as sums over this program's tokens: ``partial``
    [programs, TAPS + 1, channels].
    """
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    channel, inside, grad, width = _find(head, first, g0, g1, g2, BLOCK, H0, H1, H2, D0, D1, D2)
    x, dx = x + first * stride + channel, dx + first * to_stride + channel
    begin = tl.program_id(0) * TOKENS
    zero = tl.zeros((BLOCK,), dtype=tl.float32)
    taps, seen, inner, sums, xs, grads = (), (), (), (), (), ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + tap * channels + channel, mask=inside, other=0.0).to(tl.float32),)
        inner, sums = inner + (zero,), sums + (zero,)
        s = begin - TAPS + tap
        seen = seen + (tl.load(x + s * stride, mask=inside & (s >= 0) & (s < length), other=0.0).to(tl.float32),)
    for ahead in tl.static_range(AHEAD):
        s = begin + ahead
        xs = xs + (tl.load(x + s * stride, mask=inside & (s < length), other=0.0),)
        grads = grads + (tl.load(grad + s * width, mask=inside & (s < length), other=0.0),)
    offset, total = zero, zero
    if BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for t in tl.range(begin, begin + TOKENS + TAPS - 1, loop_unroll_factor=AHEAD):
        seen, d = seen[1:] + (xs[0].to(tl.float32),), grads[0].to(tl.float32)
        s = t + AHEAD
        xs = xs[1:] + (tl.load(x + s * stride, mask=inside & (s < length), other=0.0),)
        grads = grads[1:] + (tl.load(grad + s * width, mask=inside & (s < length), other=0.0),)
        y = offset
        for tap in tl.static_range(TAPS):
            y += taps[tap] * seen[tap]
        sigmoid = fast_sigmoid(y)
        z = y * sigmoid
        if head < NORMED:
            # both sums at once; z over its length is the output
            scale = tl.rsqrt(tl.sum(z * z, 0) + EPS)
            d = scale * d - z * (scale * scale * scale * tl.sum(d * z, 0))
        d *= sigmoid + (z - z * sigmoid)
        inner = inner[1:] + (d,)
        # token t - TAPS + 1 has now met all that it entered: through tap i the token TAPS - 1 - i later
        back = zero
        for tap in tl.static_range(TAPS):
            back += taps[tap] * inner[TAPS - 1 - tap]
        s = t - TAPS + 1
        tl.store(dx + s * to_stride, back.to(dx.dtype.element_ty), mask=inside & (s >= begin) & (s < length))
        # the last tokens are the next program's; here they only reach back
        d = tl.where(t < begin + TOKENS, d, 0.0)
        more = ()
        for tap in tl.static_range(TAPS):
            more = more + (sums[tap] + d * seen[tap],)
        sums = more
        if BIAS:
            total += d
    row = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    out = partial + row.to(tl.int64) * channels * (TAPS + 1) + channel
    for tap in tl.static_range(TAPS):
        tl.store(out + tap * channels, sums[tap], mask=inside)
    if BIAS:
        tl.store(out + TAPS * channels, total, mask=inside)
