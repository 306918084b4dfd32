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

ROWS = 32
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
        out = [
            x.new_empty(*x.shape[:2], len(weight) // dim, dim) for weight, dim in zip(weights, dims, strict=True)
        ]
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
        partial = x.new_empty(grid[0] * grid[2], x.shape[-1], weights[0].shape[-1] + 1, dtype=torch.float32)
        _backward[grid](
            x, *weights, *biases, *grads, dx, partial, x.shape[1], x.stride(1), x.shape[-1], **sizes, **taps
        )
        total = partial.sum(0)
        found = total.split([len(weight) for weight in weights])
        d_weights = [t[:, None, :-1].to(w.dtype) for t, w in zip(found, weights, strict=True)]
        d_biases = [None if b is None else t[:, -1].to(b.dtype) for t, b in zip(found, parameters[3:], strict=True)]
        return dx, *d_weights, *d_biases, None, None


def _launch(x: Tensor, parts: list[Tensor], normed: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and sizes: a program takes ``ROWS`` tokens of one head."""
    heads, dims = [t.shape[2] for t in parts], [t.shape[3] for t in parts]
    sizes: dict[str, Any] = {f"H{i}": n for i, n in enumerate(heads)} | {f"D{i}": n for i, n in enumerate(dims)}
    block = triton.next_power_of_2(max(dims))
    rows = max(1, ROWS * 128 // block)
    sizes |= {"BLOCK": block, "ROWS": rows, "NORMED": sum(heads[:normed]), "EPS": L2_EPS, "num_warps": 4}
    return (triton.cdiv(x.shape[1], rows), sum(heads), x.shape[0]), sizes


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
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    row = batch * length + t
    if head < H0:
        dim, at, weight, bias = D0, head * D0, w0, b0
        to, start = y0 + row * H0 * D0, 0
    elif head < H0 + H1:
        dim, at, weight, bias = D1, (head - H0) * D1, w1, b1
        to, start = y1 + row * H1 * D1, H0 * D0
    else:
        dim, at, weight, bias = D2, (head - H0 - H1) * D2, w2, b2
        to, start = y2 + row * H2 * D2, H0 * D0 + H1 * D1
    # lanes past the head read its first channel, and nothing of theirs is stored
    channel = at + tl.where(lane < dim, lane, 0)
    inside = (t < length) & (lane < dim)
    here = x + batch * length * stride + start + channel
    y = _activated(here, weight + channel * TAPS, bias + channel, t, inside, length, stride, TAPS, BIAS)
    y = y * tl.sigmoid(y)
    if head < NORMED:
        y = tl.where(inside, y, 0.0)
        y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    tl.store(to + channel, y.to(y0.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, w0, w1, w2, b0, b1, b2, g0, g1, g2, dx, partial, length, stride, channels,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    row = batch * length
    if head < H0:
        dim, at, weight, bias = D0, head * D0, w0, b0
        grad, width, start = g0 + row * H0 * D0, H0 * D0, 0
    elif head < H0 + H1:
        dim, at, weight, bias = D1, (head - H0) * D1, w1, b1
        grad, width, start = g1 + row * H1 * D1, H1 * D1, H0 * D0
    else:
        dim, at, weight, bias = D2, (head - H0 - H1) * D2, w2, b2
        grad, width, start = g2 + row * H2 * D2, H2 * D2, H0 * D0 + H1 * D1
    channel = at + tl.where(lane < dim, lane, 0)
    inside = (t < length) & (lane < dim)
    here = x + batch * length * stride + start + channel
    value = tl.load(here + t * stride, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros(inside.shape, dtype=tl.float32)
    to = partial + (batch * tl.num_programs(0) + tl.program_id(0)) * channels * (TAPS + 1)
    to += (start + channel) * (TAPS + 1)
    for later in tl.static_range(TAPS):
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
        tl.store(to + TAPS - 1 - later, tl.sum(d * value, 0)[None, :], mask=lane < dim)
        if later == 0:
            tl.store(to + TAPS, tl.sum(d, 0)[None, :], mask=lane < dim)
    here = dx + (row + t) * channels + start + channel
    tl.store(here, total.to(dx.dtype.element_ty), mask=inside)
