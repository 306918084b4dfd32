"""What RWKV-7 does with the memory's answers: a LayerNorm of heads, the current token's bonus, the gate."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE = 1024
"""Numbers that a program holds at a time."""

PROGRAMS = 1024
"""Programs of the backward pass: each adds up its share of the parameters' gradients."""


def bonus_reference(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, parameters: list[Tensor], eps: float
) -> Tensor:
    """``(norm(o) gain + bias + (sum of r k r_k) v) gate``, where norm and sum are over heads.

    Args:
        o: [B, T, heads, dim], what the memory answered.
        r: likewise, receptance.
        k: likewise, key.
        v: likewise, value.
        gate: [B, T, heads x dim].
        parameters: the norm's gain and bias, and ``r_k``, each [heads x dim].
        eps: of the norm.

    Returns:
        [B, T, heads x dim], like ``gate``.
    """
    gain, bias, r_k = (t.float() for t in parameters)
    r, k, v = r.float(), k.float(), v.float()
    added = (r * k * r_k.unflatten(0, o.shape[-2:])).sum(-1, keepdim=True) * v
    normed = F.layer_norm(o.float(), o.shape[-1:], eps=eps).flatten(-2) * gain + bias
    return ((normed + added.flatten(-2)) * gate.float()).to(gate.dtype)


def bonus(o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, parameters: list[Tensor], eps: float) -> Tensor:
    """``bonus_reference`` by a kernel."""
    return _Bonus.apply(o, r, k, v, gate, *parameters, eps)


class _Bonus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, eps = inputs
        given = [t.contiguous() for t in tensors]
        o, gate = given[0], given[4]
        ctx.save_for_backward(*given)
        ctx.eps = eps
        out = torch.empty_like(gate)
        sizes = _sizes(o)
        rows = o.numel() // o.shape[-1]
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](*given, out, rows, eps, **sizes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        o, parameters = given[0], given[5:]
        found = [torch.empty_like(t) for t in given[:5]]
        sizes = _sizes(o)
        tokens, heads = o.shape[0] * o.shape[1], o.shape[2]
        programs = max(1, min(PROGRAMS // heads, triton.cdiv(tokens, sizes["ROWS"])))
        steps = triton.cdiv(tokens, sizes["ROWS"] * programs)
        partial = o.new_empty(programs, 3, heads * o.shape[-1], dtype=torch.float32)
        _backward[programs, heads](*given, grad.contiguous(), *found, partial, tokens, steps, ctx.eps, **sizes)
        sums = (t.to(own.dtype) for t, own in zip(partial.sum(0), parameters, strict=True))
        return *found, *sums, None


def _sizes(o: Tensor) -> dict[str, Any]:
    heads, dim = o.shape[-2:]
    block = triton.next_power_of_2(dim)
    return {"HEADS": heads, "DIM": dim, "BLOCK": block, "ROWS": max(1, TILE // block), "num_warps": 4}


@triton.jit
def _centred(o, at, inside, eps, DIM: tl.constexpr):
    """Heads with mean 0 and variance 1, and what they were multiplied by."""
    value = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - (tl.sum(value, 1) / DIM)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
    return value * scale, scale


@triton.jit
def _forward(
    o, r, k, v, gate, gain, bias, r_k, out, rows, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside, at, own = (row < rows) & (lane < DIM), row * DIM + lane, (row % HEADS) * DIM + lane
    y, _ = _centred(o, at, inside, eps, DIM)
    y *= tl.load(gain + own, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + own, mask=inside, other=0.0).to(tl.float32)
    fit = tl.load(r + at, mask=inside, other=0.0).to(tl.float32) * tl.load(k + at, mask=inside, other=0.0)
    fit *= tl.load(r_k + own, mask=inside, other=0.0).to(tl.float32)
    y += tl.sum(fit, 1)[:, None] * tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    y *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _backward(
    o, r, k, v, gate, gain, bias, r_k, grad, do, dr, dk, dv, d_gate, partial, tokens, steps, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # a program stays in one head
    lane = tl.arange(0, BLOCK)[None, :]
    own, known = tl.program_id(1) * DIM + lane, lane < DIM
    gains = tl.load(gain + own, mask=known, other=0.0).to(tl.float32)
    biases = tl.load(bias + own, mask=known, other=0.0).to(tl.float32)
    shares = tl.load(r_k + own, mask=known, other=0.0).to(tl.float32)
    total_gain = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    total_bias, total_share = total_gain, total_gain
    for step in range(steps):
        token = ((tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside, at = (token < tokens) & known, token * HEADS * DIM + own
        y, scale = _centred(o, at, inside, eps, DIM)
        receptance = tl.load(r + at, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        fit = tl.sum(receptance * key * shares, 1)[:, None]
        d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_gate + at, (d * (y * gains + biases + fit * value)).to(dr.dtype.element_ty), mask=inside)
        d *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        total_gain += d * y
        total_bias += d
        tl.store(dv + at, (d * fit).to(dr.dtype.element_ty), mask=inside)
        d_fit = tl.sum(d * value, 1)[:, None]
        tl.store(dr + at, (d_fit * key * shares).to(dr.dtype.element_ty), mask=inside)
        tl.store(dk + at, (d_fit * receptance * shares).to(dr.dtype.element_ty), mask=inside)
        total_share += d_fit * receptance * key
        d *= gains
        d = scale * (d - (tl.sum(d, 1) / DIM)[:, None] - y * (tl.sum(d * y, 1) / DIM)[:, None])
        tl.store(do + at, d.to(do.dtype.element_ty), mask=inside)
    to = partial + tl.program_id(0) * 3 * HEADS * DIM + own
    tl.store(to, tl.sum(total_gain, 0)[None, :], mask=known)
    tl.store(to + HEADS * DIM, tl.sum(total_bias, 0)[None, :], mask=known)
    tl.store(to + 2 * HEADS * DIM, tl.sum(total_share, 0)[None, :], mask=known)
