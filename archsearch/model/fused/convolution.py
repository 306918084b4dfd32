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
        x: [B, T, channels], the parts side by side.
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
    """``convolve_reference`` by a kernel; ``x`` may be a slice of a wider projection."""
    return list(_Convolve.apply(x, *weights, *(biases or [None] * 3), dims, normed))


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *parameters, dims, normed = rest
        if x.stride(-1) != 1 or x.stride(0) != x.shape[1] * x.stride(1):
            x = x.contiguous()
        weights = [t.contiguous() for t in parameters[:3]]
        ctx.save_for_backward(x, *weights, *parameters[3:])
        ctx.dims, ctx.normed = dims, normed
        out = [x.new_empty(*x.shape[:2], len(weight) // dim, dim) for weight, dim in zip(weights, dims, strict=True)]
        grid, sizes = _launch(x, out, normed)
        taps = {"TAPS": weights[0].shape[-1], "BIAS": parameters[3] is not None}
        biases = parameters[3:] if taps["BIAS"] else weights  # a kernel takes no None; these are never read
        _forward[grid](x, *weights, *biases, *out, x.shape[1], x.stride(1), **sizes, **taps)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weights = parameters[:3]
        grads = tuple(grad.contiguous() for grad in grads)
        grid, sizes = _launch(x, list(grads), ctx.normed)
        taps = {"TAPS": weights[0].shape[-1], "BIAS": parameters[3] is not None}
        biases = parameters[3:] if taps["BIAS"] else weights
        dx = x.new_empty(x.shape)
        # a row of blocks each, added up below: no atomics, so the same inputs give the same bits
        number = triton.next_power_of_2(taps["TAPS"] + 1)
        partial = x.new_empty(grid[0] * grid[2], x.shape[-1], number, dtype=torch.float32)
        _backward[grid](
            x, *weights, *biases, *grads, dx, partial, x.shape[1], x.stride(1), x.shape[-1], SUMS=number,
            **sizes, **taps,
        )  # fmt: skip
        total = partial.sum(0)
        found = total.split([len(weight) for weight in weights])
        d_weights = [t[:, None, : w.shape[-1]].to(w.dtype) for t, w in zip(found, weights, strict=True)]
        d_biases = [
            None if b is None else t[:, taps["TAPS"]].to(b.dtype) for t, b in zip(found, parameters[3:], strict=True)
        ]
        return dx, *d_weights, *d_biases, None, None


def _launch(x: Tensor, parts: list[Tensor], normed: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and sizes: a program takes ``STEPS`` times ``ROWS`` tokens of one head."""
    heads, dims = [t.shape[2] for t in parts], [t.shape[3] for t in parts]
    sizes: dict[str, Any] = {f"H{i}": n for i, n in enumerate(heads)} | {f"D{i}": n for i, n in enumerate(dims)}
    block = triton.next_power_of_2(max(dims))
    rows = max(1, TILE // block)
    sizes |= {"BLOCK": block, "ROWS": rows, "NORMED": sum(heads[:normed]), "EPS": L2_EPS, "num_warps": 4}
    steps = min(STEPS, triton.cdiv(x.shape[1], rows))
    return (triton.cdiv(x.shape[1], steps * rows), sum(heads), x.shape[0]), sizes | {"STEPS": steps}


@triton.jit
def _activated(x, weight, bias, t, inside, length, stride, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """The convolution's outputs before SiLU at tokens ``t`` [ROWS, 1] of the channels that the pointers name."""
    y = tl.zeros(inside.shape, dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        s = t + (tap - TAPS + 1)
        value = tl.load(x + s * stride, mask=inside & (s >= 0) & (s < length), other=0.0).to(tl.float32)
        y += value * tl.load(weight + tap).to(tl.float32)
    if BIAS:
        y += tl.load(bias).to(tl.float32)
    return y


@triton.jit
def _forward(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, length, stride,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)[None, :]
    if head < H0:
        dim, at, weight, bias, start = D0, head * D0, w0, b0, 0
        to, width = y0 + first * H0 * D0, H0 * D0
    elif head < H0 + H1:
        dim, at, weight, bias, start = D1, (head - H0) * D1, w1, b1, H0 * D0
        to, width = y1 + first * H1 * D1, H1 * D1
    else:
        dim, at, weight, bias, start = D2, (head - H0 - H1) * D2, w2, b2, H0 * D0 + H1 * D1
        to, width = y2 + first * H2 * D2, H2 * D2
    # lanes past the head read its first channel, and nothing of theirs is stored
    channel = at + tl.where(lane < dim, lane, 0)
    here = x + first * stride + start + channel
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (t < length) & (lane < dim)
        y = _activated(here, weight + channel * TAPS, bias + channel, t, inside, length, stride, TAPS, BIAS)
        y = y * tl.sigmoid(y)
        if head < NORMED:
            y = tl.where(inside, y, 0.0)
            y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        tl.store(to + t * width + channel, y.to(y0.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, w0, w1, w2, b0, b1, b2, g0, g1, g2, dx, partial, length, stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(1), tl.program_id(2).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)[None, :]
    if head < H0:
        dim, at, weight, bias, start = D0, head * D0, w0, b0, 0
        grad, width = g0 + first * H0 * D0, H0 * D0
    elif head < H0 + H1:
        dim, at, weight, bias, start = D1, (head - H0) * D1, w1, b1, H0 * D0
        grad, width = g1 + first * H1 * D1, H1 * D1
    else:
        dim, at, weight, bias, start = D2, (head - H0 - H1) * D2, w2, b2, H0 * D0 + H1 * D1
        grad, width = g2 + first * H2 * D2, H2 * D2
    channel = at + tl.where(lane < dim, lane, 0)
    here = x + first * stride + start + channel
    # sums over tokens [SUMS, BLOCK]: one row a tap, one for the bias
    sums = tl.zeros((SUMS, BLOCK), dtype=tl.float32)
    index = tl.arange(0, SUMS)[:, None]
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (t < length) & (lane < dim)
        value = tl.load(here + t * stride, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for later in range(TAPS):  # not unrolled: that took 12 s to compile
            # token s = t + later saw token t through tap TAPS - 1 - later
            s = t + later
            reach = (s < length) & (lane < dim)
            y = _activated(here, weight + channel * TAPS, bias + channel, s, reach, length, stride, TAPS, BIAS)
            sigmoid = tl.sigmoid(y)
            d = tl.load(grad + s * width + channel, mask=reach, other=0.0).to(tl.float32)
            if head < NORMED:
                z = tl.where(reach, y * sigmoid, 0.0)
                scale = tl.rsqrt(tl.sum(z * z, 1) + EPS)[:, None]
                z *= scale
                d = scale * (d - z * tl.sum(d * z, 1)[:, None])
            d = tl.where(reach, d * sigmoid * (1 + y * (1 - sigmoid)), 0.0)
            total += d * tl.load(weight + channel * TAPS + TAPS - 1 - later).to(tl.float32)
            sums += tl.where(index == TAPS - 1 - later, tl.sum(d * value, 0)[None, :], 0.0)
            if BIAS and later == 0:
                sums += tl.where(index == TAPS, tl.sum(d, 0)[None, :], 0.0)
        to = dx + first * channels + start + channel
        tl.store(to + t * channels, total.to(dx.dtype.element_ty), mask=inside)
    to = partial + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels * SUMS
    tl.store(to + (start + channel) * SUMS + index, sums, mask=lane < dim)
