"""``silu(gate) * up`` of a merged projection, and its gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024
"""Outputs of a program: rows are laid end to end, so that none of its lanes idles where a row ends."""


def swiglu_reference(merged: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[gate | up]`` in the last dimension."""
    gate, up = merged.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(merged: Tensor) -> Tensor:
    """``swiglu_reference`` by a kernel: [..., 2 inner] to [..., inner]."""
    return _SwiGLU.apply(merged)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged: Tensor) -> Tensor:
        merged = merged.contiguous()
        inner = merged.shape[-1] // 2
        out = merged.new_empty(*merged.shape[:-1], inner)
        ctx.save_for_backward(merged)
        _swiglu_forward[(triton.cdiv(out.numel(), BLOCK),)](merged, out, out.numel(), INNER=inner, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (merged,) = ctx.saved_tensors
        grad, inner = grad.contiguous(), merged.shape[-1] // 2
        out = torch.empty_like(merged)
        _swiglu_backward[(triton.cdiv(grad.numel(), BLOCK),)](merged, grad, out, grad.numel(), INNER=inner, BLOCK=BLOCK)
        return out


@triton.jit
def _place(total, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Which outputs a program computes, where the gate of each is, and whether they exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, (at // INNER) * (2 * INNER) + at % INNER, at < total


@triton.jit
def _swiglu_forward(merged, out, total, INNER: tl.constexpr, BLOCK: tl.constexpr):
    at, place, inside = _place(total, INNER, BLOCK)
    gate = tl.load(merged + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + place + INNER, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(merged, grad, out, total, INNER: tl.constexpr, BLOCK: tl.constexpr):
    at, place, inside = _place(total, INNER, BLOCK)
    gate = tl.load(merged + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + place + INNER, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = dy * up * s * (1 + gate * (1 - s))
    tl.store(out + place, d_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + INNER, (dy * gate * s).to(out.dtype.element_ty), mask=inside)
