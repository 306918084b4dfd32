"""Queries, keys and values of attention out of a merged projection: RMSNorm of heads, then rotation.

One kernel forward and one backward, whatever the options: between the projection and the attention
each number is read once and written once, and gradients go straight into the merged layout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ROWS = 16


@functools.cache  # and never dropped: captured graphs keep its address
def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position's angles: fp32 [2, length, head_dim / 2]."""
    half = head_dim // 2
    frequencies = theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def split_heads_reference(
    merged: Tensor, table: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, heads, D] of ``[q | k | v]`` [B, T, (heads + 2 kv_heads) D].

    Args:
        merged: the projection.
        table: what ``rotary_table`` gives.
        q_gain: [D], weight of the queries' norm; no norm when absent.
        k_gain: [D], likewise for keys.
        heads: of queries.
        kv_heads: of keys, and of values.
        eps: of the norms.
    """
    q, k, v = merged.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=-2)
    cos, sin = (t[:, None] for t in table)

    def place(x: Tensor, gain: Tensor | None) -> Tensor:
        exact = x.float()
        if gain is not None:
            exact = F.rms_norm(exact, gain.shape, gain.float(), eps)
        first, second = exact.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return place(q, q_gain), place(k, k_gain), v


def split_heads(
    merged: Tensor, table: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``split_heads_reference`` by a kernel."""
    return _SplitHeads.apply(merged, table, q_gain, k_gain, heads, kv_heads, eps)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        table: Tensor,
        q_gain: Tensor | None,
        k_gain: Tensor | None,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        merged = merged.contiguous()
        batch, length, width = merged.shape
        dim = width // (heads + 2 * kv_heads)
        q = merged.new_empty(batch, length, heads, dim)
        k, v = (merged.new_empty(batch, length, kv_heads, dim) for _ in range(2))
        ctx.save_for_backward(merged, table, q_gain, k_gain)
        ctx.eps = eps
        _split_heads_forward[_grid(q, k)](
            merged, table, q_gain, k_gain, q, k, v, batch * length, length, eps, **_sizes(q, k, q_gain)
        )  # fmt: skip
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        merged, table, q_gain, k_gain = ctx.saved_tensors
        dq, dk, dv = (grad.contiguous() for grad in grads)
        out = torch.empty_like(merged)
        rows = dq.shape[0] * dq.shape[1]
        grid = _grid(dq, dk)
        d_gain = None if q_gain is None else merged.new_empty(grid[0], grid[1], dq.shape[-1], dtype=torch.float32)
        _split_heads_backward[grid](
            merged, table, q_gain, k_gain, dq, dk, dv, out, d_gain, rows, dq.shape[1], ctx.eps,
            **_sizes(dq, dk, q_gain),
        )  # fmt: skip
        if d_gain is None or q_gain is None:
            return out, None, None, None, None, None, None
        heads, kv_heads = dq.shape[2], dk.shape[2]
        d_q, d_k = (d_gain[:, at : at + n].sum((0, 1)) for at, n in ((0, heads), (heads, kv_heads)))
        return out, None, d_q.to(q_gain.dtype), d_k.to(q_gain.dtype), None, None, None


def _grid(q: Tensor, k: Tensor) -> tuple[int, int]:
    return triton.cdiv(q.shape[0] * q.shape[1], ROWS), q.shape[2] + 2 * k.shape[2]


def _sizes(q: Tensor, k: Tensor, gain: Tensor | None) -> dict[str, Any]:
    half = q.shape[-1] // 2
    return {
        "HEADS": q.shape[2], "KV_HEADS": k.shape[2], "HALF": half, "BLOCK": triton.next_power_of_2(half),
        "ROWS": ROWS, "NORM": gain is not None, "num_warps": 4,
    }  # fmt: skip


@triton.jit
def _split_heads_forward(
    merged, table, q_gain, k_gain, q, k, v, rows, length, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < HALF)
    at = (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + column
    first = tl.load(merged + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(merged + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            gain = q_gain if head < HEADS else k_gain
            mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
            scale = tl.rsqrt(mean + eps)[:, None]
            first *= scale * tl.load(gain + column, mask=column < HALF, other=0.0).to(tl.float32)
            second *= scale * tl.load(gain + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        angle = (row % length) * HALF + column
        cos = tl.load(table + angle, mask=inside, other=0.0)
        sin = tl.load(table + length * HALF + angle, mask=inside, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
    if head < HEADS:
        to = q + (row * HEADS + head) * 2 * HALF + column
    elif head < HEADS + KV_HEADS:
        to = k + (row * KV_HEADS + head - HEADS) * 2 * HALF + column
    else:
        to = v + (row * KV_HEADS + head - HEADS - KV_HEADS) * 2 * HALF + column
    tl.store(to, first.to(q.dtype.element_ty), mask=inside)
    tl.store(to + HALF, second.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _split_heads_backward(
    merged, table, q_gain, k_gain, dq, dk, dv, out, d_gain, rows, length, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < HALF)
    if head < HEADS:
        source = dq + (row * HEADS + head) * 2 * HALF + column
    elif head < HEADS + KV_HEADS:
        source = dk + (row * KV_HEADS + head - HEADS) * 2 * HALF + column
    else:
        source = dv + (row * KV_HEADS + head - HEADS - KV_HEADS) * 2 * HALF + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    at = (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + column
    if head < HEADS + KV_HEADS:
        angle = (row % length) * HALF + column
        cos = tl.load(table + angle, mask=inside, other=0.0)
        sin = tl.load(table + length * HALF + angle, mask=inside, other=0.0)
        first, second = first * cos + second * sin, second * cos - first * sin
        if NORM:
            gain = q_gain if head < HEADS else k_gain
            x1 = tl.load(merged + at, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(merged + at + HALF, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
            x1, x2 = x1 * scale, x2 * scale
            to = d_gain + (tl.program_id(0) * tl.num_programs(1) + head) * 2 * HALF + tl.arange(0, BLOCK)
            tl.store(to, tl.sum(first * x1, 0), mask=tl.arange(0, BLOCK) < HALF)
            tl.store(to + HALF, tl.sum(second * x2, 0), mask=tl.arange(0, BLOCK) < HALF)
            first *= tl.load(gain + column, mask=column < HALF, other=0.0).to(tl.float32)
            second *= tl.load(gain + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
            along = ((tl.sum(first * x1, 1) + tl.sum(second * x2, 1)) / (2 * HALF))[:, None]
            first, second = scale * (first - x1 * along), scale * (second - x2 * along)
    tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=inside)
