"""RMSNorm of rows, of heads or of groups of channels, with a gate behind it or before it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE, BACKWARD_TILE = 4096, 2048
"""Numbers that a program holds at a time; the backward pass needs three times the registers for each."""

PROGRAMS = 1024
"""Programs of the backward pass: each adds up its share of the gain's gradient in registers."""

GATE_AFTER, GATE_BEFORE, SIGMOID_AFTER = 1, 2, 3


def norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    *,
    gate_first: bool = False,
    activation: str = "silu",
) -> Tensor:
    """``rms_norm(x) * weight``, times ``silu(gate)``; with ``gate_first`` the gate multiplies ``x`` instead.

    Args:
        x: [..., size], of which rows of ``len(weight)`` numbers are normalised; or [..., groups, size],
            where ``weight`` has groups x size numbers.
        weight: the gains.
        eps: added to the mean square.
        gate: like ``x``; none when absent.
        gate_first: Mamba-2's order.
        activation: of the gate, ``silu``, or ``sigmoid`` for one behind the norm.
    """
    exact = x.float()
    if gate is not None and gate_first:
        exact = exact * F.silu(gate.float())
    y = F.rms_norm(exact, x.shape[-1:], eps=eps)
    y = y * weight.float().view(-1, x.shape[-1]).squeeze(0)
    if gate is not None and not gate_first:
        y = y * (F.silu if activation == "silu" else torch.sigmoid)(gate.float())
    return y


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    *,
    gate_first: bool = False,
    activation: str = "silu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``norm_reference`` by a kernel, given as ``dtype`` (that of ``x`` when absent)."""
    after = GATE_AFTER if activation == "silu" else SIGMOID_AFTER
    order = 0 if gate is None else GATE_BEFORE if gate_first else after
    return _Norm.apply(x, weight, gate, eps, order, dtype or x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, order: int, dtype: torch.dtype
    ) -> Tensor:
        x, stride = _rows(x)
        gate, gate_stride = (None, 0) if gate is None else _rows(gate)
        out = x.new_empty(x.shape, dtype=dtype)
        sizes = _sizes(x, weight)
        rows = x.numel() // x.shape[-1]
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        _norm_forward[grid](
            x, weight, x if gate is None else gate, out, rows, stride, gate_stride, eps, ORDER=order, **sizes
        )
        ctx.save_for_backward(x, weight, gate)
        ctx.eps, ctx.order, ctx.strides = eps, order, (stride, gate_stride)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        grad = grad.contiguous()
        dx = x.new_empty(x.shape)
        dg = None if gate is None else gate.new_empty(gate.shape)
        sizes = _sizes(x, weight, BACKWARD_TILE)
        rows, groups = x.numel() // x.shape[-1], sizes["GROUPS"]
        programs = groups * max(1, min(PROGRAMS, triton.cdiv(rows, sizes["ROWS"])) // groups)
        steps = triton.cdiv(rows // groups, sizes["ROWS"] * (programs // groups))
        partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        unused = (gate, dg) if gate is not None else (x, dx)
        _norm_backward[(programs,)](
            x, weight, *unused, grad, dx, partial, rows // groups, steps, *ctx.strides, ctx.eps,
            ORDER=ctx.order, **sizes,
        )  # fmt: skip
        d_weight = partial.view(-1, groups, x.shape[-1]).sum(0).view_as(weight).to(weight.dtype)
        return dx, d_weight, dg, None, None, None


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and the distance of its tokens: all of it is dense, or its last dimension is a slice of wider tokens."""
    token = x.shape[-1] if x.dim() < 4 else x.shape[-2] * x.shape[-1]
    if x.is_contiguous():
        return x, token
    dense = x.stride(-1) == 1 and (x.dim() < 4 or x.stride(-2) == x.shape[-1])
    if x.dim() >= 3 and dense and x.stride(0) == x.shape[1] * x.stride(1):
        return x, x.stride(1)
    return x.contiguous(), token


def _sizes(x: Tensor, weight: Tensor, tile: int = TILE) -> dict[str, Any]:
    """``HEADS`` rows a token, ``GROUPS`` of gains."""
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    return {
        "HEADS": x.shape[-2] if x.dim() >= 4 else 1, "GROUPS": weight.numel() // size, "SIZE": size, "BLOCK": block,
        "ROWS": max(1, tile // block), "num_warps": 4 if block <= tile else 8,
    }  # fmt: skip


@triton.jit
def _place(row, stride, lane, HEADS: tl.constexpr, SIZE: tl.constexpr):
    return (row // HEADS) * stride + (row % HEADS) * SIZE + lane


@triton.jit
def _norm_forward(
    x, weight, gate, out, rows, stride, gate_stride, eps, ORDER: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (lane < SIZE)
    value = tl.load(x + _place(row, stride, lane, HEADS, SIZE), mask=inside, other=0.0).to(tl.float32)
    if ORDER != 0:
        g = tl.load(gate + _place(row, gate_stride, lane, HEADS, SIZE), mask=inside, other=0.0).to(tl.float32)
        silu = g * tl.sigmoid(g)
    if ORDER == 2:
        value *= silu
    value *= tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
    value *= tl.load(weight + (row % GROUPS) * SIZE + lane, mask=inside, other=0.0).to(tl.float32)
    if ORDER == 1:
        value *= silu
    if ORDER == 3:
        value *= tl.sigmoid(g)
    tl.store(out + row * SIZE + lane, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _norm_backward(
    x, weight, gate, dg, grad, dx, partial, rows, steps, stride, gate_stride, eps, ORDER: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # a program stays in one group; ``rows`` are those of a group
    program, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    lane = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + group * SIZE + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(steps):
        index = ((program * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        row = index * GROUPS + group
        inside = (index < rows) & (lane < SIZE)
        value = tl.load(x + _place(row, stride, lane, HEADS, SIZE), mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * SIZE + lane, mask=inside, other=0.0).to(tl.float32)
        raw = value
        if ORDER != 0:
            g = tl.load(gate + _place(row, gate_stride, lane, HEADS, SIZE), mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            slope = sigmoid * (1 + g * (1 - sigmoid))
            active = g * sigmoid
        if ORDER == 3:
            slope, active = sigmoid * (1 - sigmoid), sigmoid
        if ORDER == 2:
            value *= g * sigmoid
        scale = tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
        value *= scale
        if ORDER == 1 or ORDER == 3:
            tl.store(dg + row * SIZE + lane, (dy * value * gain * slope).to(dg.dtype.element_ty), mask=inside)
            dy *= active
        total += dy * value
        dy *= gain
        dy = scale * (dy - value * (tl.sum(dy * value, 1) / SIZE)[:, None])
        if ORDER == 2:
            tl.store(dg + row * SIZE + lane, (dy * raw * slope).to(dg.dtype.element_ty), mask=inside)
            dy *= g * sigmoid
        tl.store(dx + row * SIZE + lane, dy.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * SIZE + lane, tl.sum(total, 0)[None, :], mask=lane < SIZE)
