"""Where layers meet: what one adds to the residual stream, and the RMSNorm in front of the next, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE, BACKWARD_TILE = 4096, 2048
"""Numbers that a program holds at a time; the backward pass needs three times the registers for each."""

PROGRAMS = 792
"""Programs of the backward pass, six for each multiprocessor of a Hopper GPU: each adds up its share of the gain's
gradient in registers. Side by side they work on neighbouring rows.
"""

WARPS, BACKWARD_WARPS = 4, 2
"""Of a program; a backward one whose rows are few adds up across less of them."""


def add_norm_reference(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + added`` and its RMSNorm, both like ``x``; [..., size]."""
    total = x + added
    return total, F.rms_norm(total.float(), weight.shape, weight.float(), eps).to(x.dtype)


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_norm_reference`` by a kernel."""
    return _AddNorm.apply(x, added, weight, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, added = x.contiguous(), added.contiguous()
        total, normed = torch.empty_like(x), torch.empty_like(x)
        sizes = _sizes(weight, TILE, WARPS)
        rows = x.numel() // len(weight)
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        _add_norm[grid](x, added, weight, total, normed, rows, eps, **sizes)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if d_normed is None:
            return d_total, d_total, None, None
        dx = torch.empty_like(total)
        sizes = _sizes(weight, BACKWARD_TILE, BACKWARD_WARPS)
        rows = total.numel() // len(weight)
        programs = min(PROGRAMS, triton.cdiv(rows, sizes["ROWS"]))
        steps = triton.cdiv(rows, sizes["ROWS"] * programs)
        partial = total.new_empty(programs, len(weight), dtype=torch.float32)
        beside = total if d_total is None else d_total.contiguous()
        _add_norm_backward[(programs,)](
            total, weight, d_normed.contiguous(), beside, dx, partial, rows, steps, ctx.eps,
            PASSED=d_total is not None, **sizes,
        )  # fmt: skip
        return dx, dx, partial.sum(0).to(weight.dtype), None


def _sizes(weight: Tensor, tile: int, warps: int) -> dict[str, int]:
    block = triton.next_power_of_2(len(weight))
    rows = max(1, tile // block)
    return {"SIZE": len(weight), "BLOCK": block, "ROWS": rows, "num_warps": warps if block <= tile else 8}


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x, added, weight, total, normed, rows, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (lane < SIZE)
    place = row * SIZE + lane
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    # the norm is of the sum as it is kept, so that the backward pass sees the same numbers
    kept = value.to(total.dtype.element_ty)
    tl.store(total + place, kept, mask=inside)
    value = kept.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
    value *= tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _add_norm_backward(
    total, weight, grad, beside, dx, partial, rows, steps, eps, PASSED: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(steps):
        row = ((step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (lane < SIZE)
        place = row * SIZE + lane
        value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
        value *= scale
        sums += dy * value
        dy *= gain
        dy = scale * (dy - value * (tl.sum(dy * value, 1) / SIZE)[:, None])
        if PASSED:
            dy += tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, dy.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * SIZE + lane, tl.sum(sums, 0)[None, :], mask=lane < SIZE)
