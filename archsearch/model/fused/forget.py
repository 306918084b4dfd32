"""HGRN2's inputs out of a merged projection: queries, keys that the forget gate leaves open, values, log decays."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 512


def forget_gates_reference(merged: Tensor) -> tuple[Tensor, ...]:
    """``silu(q)``, ``sigmoid(-f)``, ``v`` and ``logsigmoid(f)`` in fp32, each [B, T, size].

    Args:
        merged: ``[q | f | v]``, [B, T, 3 size].
    """
    q, forget, v = merged.chunk(3, dim=-1)
    return F.silu(q), (-forget).sigmoid(), v, F.logsigmoid(forget.float())


def forget_gates(merged: Tensor) -> tuple[Tensor, ...]:
    """``forget_gates_reference`` by a kernel."""
    return _ForgetGates.apply(merged)


class _ForgetGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged: Tensor) -> tuple[Tensor, ...]:
        merged = merged.contiguous()
        ctx.save_for_backward(merged)
        size = merged.shape[-1] // 3
        q, k, v = (merged.new_empty(*merged.shape[:-1], size) for _ in range(3))
        decay = torch.empty_like(q, dtype=torch.float32)
        _forward[_grid(merged)](merged, q, k, v, decay, size, BLOCK=BLOCK)
        return q, k, v, decay

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (merged,) = ctx.saved_tensors
        out, size = torch.empty_like(merged), merged.shape[-1] // 3
        _backward[_grid(merged)](merged, *(grad.contiguous() for grad in grads), out, size, BLOCK=BLOCK)
        return out


def _grid(merged: Tensor) -> tuple[int, int]:
    size = merged.shape[-1] // 3
    return merged.numel() // (3 * size), triton.cdiv(size, BLOCK)


@triton.jit
def _forward(merged, q, k, v, decay, size, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, source, to = column < size, merged + row * 3 * size + column, row * size + column
    query = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(q + to, (query * tl.sigmoid(query)).to(q.dtype.element_ty), mask=inside)
    forget = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(k + to, tl.sigmoid(-forget).to(k.dtype.element_ty), mask=inside)
    # minus softplus(-f), in the form that overflows on neither side
    tl.store(decay + to, tl.minimum(forget, 0.0) - tl.log(1 + tl.exp(-tl.abs(forget))), mask=inside)
    tl.store(v + to, tl.load(source + 2 * size, mask=inside, other=0.0), mask=inside)


@triton.jit
def _backward(merged, dq, dk, dv, d_decay, out, size, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at, source = column < size, row * 3 * size + column, row * size + column
    query = tl.load(merged + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.sigmoid(query)
    slope = tl.load(dq + source, mask=inside, other=0.0).to(tl.float32) * weight * (1 + query * (1 - weight))
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=inside)
    key = tl.sigmoid(-tl.load(merged + at + size, mask=inside, other=0.0).to(tl.float32))
    slope = tl.load(dk + source, mask=inside, other=0.0).to(tl.float32) * (key - 1)
    slope = key * (slope + tl.load(d_decay + source, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + at + size, slope.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + 2 * size, tl.load(dv + source, mask=inside, other=0.0), mask=inside)
