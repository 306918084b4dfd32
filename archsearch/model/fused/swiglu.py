"""``silu(gate) * up`` of a merged projection, and its gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


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
        grid = (out.numel() // inner, triton.cdiv(inner, BLOCK))
        _swiglu_forward[grid](merged, out, inner, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (merged,) = ctx.saved_tensors
        grad, inner = grad.contiguous(), merged.shape[-1] // 2
        out = torch.empty_like(merged)
        grid = (grad.numel() // inner, triton.cdiv(inner, BLOCK))
        _swiglu_backward[grid](merged, grad, out, inner, BLOCK=BLOCK)
        return out


@triton.jit
def _swiglu_forward(merged, out, inner, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(merged + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(merged, grad, out, inner, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(merged + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * inner + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = dy * up * s * (1 + gate * (1 - s))
    at = out + row * 2 * inner + column
    tl.store(at, d_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(at + inner, (dy * gate * s).to(out.dtype.element_ty), mask=inside)
