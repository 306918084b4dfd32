"""RWKV-7's transition out of its projections: log decay, key, and the pair that removes what a key held."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Numbers that a program holds at a time."""

PROGRAMS = 1024
"""Programs of the backward pass: each adds up its share of the parameters' gradients."""

L2_EPS = 1e-6


def transition_reference(
    k: Tensor, w: Tensor, a: Tensor, parameters: list[Tensor], strongest: float, heads: int
) -> list[Tensor]:
    """With rate ``s(a + a_bias)`` and removal key ``kk``, ``k k_k`` with heads of length 1, what the recurrence takes.

    Args:
        k: [B, T, size], keys as projected.
        w: likewise, of the decays before bias and sigmoid.
        a: likewise, of the rates.
        parameters: ``k_k``, ``k_a``, and the biases of ``w`` and of ``a``, each [size].
        strongest: the log decay where the sigmoid is 1.
        heads: that ``size`` is made of.

    Returns:
        ``k (1 + (rate - 1) k_a)``, ``-kk``, ``kk rate`` and ``strongest s(w + w_bias)``, as [B, T, heads, dim].
    """
    k_k, k_a, w_bias, a_bias = (t.float() for t in parameters)
    rate, decay = (a.float() + a_bias).sigmoid(), strongest * (w.float() + w_bias).sigmoid()
    exact = k.float()
    removal = (exact * k_k).unflatten(-1, (heads, -1))
    removal = (removal * (removal.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()).flatten(-2)
    found = exact * (1 + (rate - 1) * k_a), -removal, removal * rate, decay
    return [t.to(k.dtype).unflatten(-1, (heads, -1)) for t in found]


def transition(k: Tensor, w: Tensor, a: Tensor, parameters: list[Tensor], strongest: float, heads: int) -> list[Tensor]:
    """``transition_reference`` by a kernel."""
    return list(_Transition.apply(k, w, a, *parameters, strongest, heads))


class _Transition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, w: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *parameters, strongest, heads = rest
        k, w, a = k.contiguous(), w.contiguous(), a.contiguous()
        ctx.save_for_backward(k, w, a, *parameters)
        ctx.strongest, ctx.heads = strongest, heads
        out = [k.new_empty(*k.shape[:-1], heads, k.shape[-1] // heads) for _ in range(4)]
        sizes = _sizes(k, heads)
        rows = k.shape[0] * k.shape[1] * heads
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](k, w, a, *parameters, *out, rows, strongest, L2_EPS, **sizes)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, w, a, *parameters = ctx.saved_tensors
        dk, dw, da = (torch.empty_like(k) for _ in range(3))
        sizes = _sizes(k, ctx.heads)
        tokens, heads = k.shape[0] * k.shape[1], ctx.heads
        programs = max(1, min(PROGRAMS // heads, triton.cdiv(tokens, sizes["ROWS"])))
        steps = triton.cdiv(tokens, sizes["ROWS"] * programs)
        partial = k.new_empty(programs, 4, k.shape[-1], dtype=torch.float32)
        _backward[programs, heads](
            k, w, a, *parameters, *(grad.contiguous() for grad in grads), dk, dw, da, partial, tokens, steps,
            ctx.strongest, L2_EPS, **sizes,
        )  # fmt: skip
        found = (t.to(own.dtype) for t, own in zip(partial.sum(0), parameters, strict=True))
        return dk, dw, da, *found, None, None


def _sizes(k: Tensor, heads: int) -> dict[str, Any]:
    dim = k.shape[-1] // heads
    block = triton.next_power_of_2(dim)
    return {"HEADS": heads, "DIM": dim, "BLOCK": block, "ROWS": max(1, TILE // block), "num_warps": 4}


@triton.jit(do_not_specialize=["strongest"])
def _forward(
    k, w, a, k_k, k_a, w_bias, a_bias, key, removal, replaced, decay, rows, strongest, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside, at, own = (row < rows) & (lane < DIM), row * DIM + lane, (row % HEADS) * DIM + lane
    value = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.sigmoid(logit + tl.load(a_bias + own, mask=inside, other=0.0).to(tl.float32))
    logit = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    weak = tl.sigmoid(logit + tl.load(w_bias + own, mask=inside, other=0.0).to(tl.float32))
    unit = value * tl.load(k_k + own, mask=inside, other=0.0).to(tl.float32)
    unit *= tl.rsqrt(tl.sum(unit * unit, 1) + eps)[:, None]
    value *= 1 + (rate - 1) * tl.load(k_a + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(key + at, value.to(key.dtype.element_ty), mask=inside)
    tl.store(removal + at, (-unit).to(key.dtype.element_ty), mask=inside)
    tl.store(replaced + at, (unit * rate).to(key.dtype.element_ty), mask=inside)
    tl.store(decay + at, (strongest * weak).to(key.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["strongest", "steps"])
def _backward(
    k, w, a, k_k, k_a, w_bias, a_bias, d_key, d_removal, d_replaced, d_decay, dk, dw, da, partial, tokens, steps,
    strongest, eps, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # a program stays in one head
    lane = tl.arange(0, BLOCK)[None, :]
    own, known = tl.program_id(1) * DIM + lane, lane < DIM
    scale_k = tl.load(k_k + own, mask=known, other=0.0).to(tl.float32)
    scale_a = tl.load(k_a + own, mask=known, other=0.0).to(tl.float32)
    bias_w = tl.load(w_bias + own, mask=known, other=0.0).to(tl.float32)
    bias_a = tl.load(a_bias + own, mask=known, other=0.0).to(tl.float32)
    total_k = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    total_a, total_bw, total_ba = total_k, total_k, total_k
    for step in range(steps):
        token = ((tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside, at = (token < tokens) & known, token * HEADS * DIM + own
        value = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        rate = tl.sigmoid(tl.load(a + at, mask=inside, other=0.0).to(tl.float32) + bias_a)
        weak = tl.sigmoid(tl.load(w + at, mask=inside, other=0.0).to(tl.float32) + bias_w)
        g = tl.load(d_decay + at, mask=inside, other=0.0).to(tl.float32) * strongest * weak * (1 - weak)
        total_bw += g
        tl.store(dw + at, g.to(dw.dtype.element_ty), mask=inside)
        unit = value * scale_k
        length = tl.rsqrt(tl.sum(unit * unit, 1) + eps)[:, None]
        unit *= length
        g = tl.load(d_key + at, mask=inside, other=0.0).to(tl.float32)
        replaced = tl.load(d_replaced + at, mask=inside, other=0.0).to(tl.float32)
        d_rate = (g * value * scale_a + replaced * unit) * rate * (1 - rate)
        total_a += g * value * (rate - 1)
        total_ba += d_rate
        tl.store(da + at, d_rate.to(da.dtype.element_ty), mask=inside)
        d = replaced * rate - tl.load(d_removal + at, mask=inside, other=0.0).to(tl.float32)
        d = length * (d - unit * tl.sum(d * unit, 1)[:, None])
        total_k += d * value
        g = g * (1 + (rate - 1) * scale_a) + d * scale_k
        tl.store(dk + at, g.to(dk.dtype.element_ty), mask=inside)
    to = partial + tl.program_id(0) * 4 * HEADS * DIM + own
    tl.store(to, tl.sum(total_k, 0)[None, :], mask=known)
    tl.store(to + HEADS * DIM, tl.sum(total_a, 0)[None, :], mask=known)
    tl.store(to + 2 * HEADS * DIM, tl.sum(total_bw, 0)[None, :], mask=known)
    tl.store(to + 3 * HEADS * DIM, tl.sum(total_ba, 0)[None, :], mask=known)
