"""RWKV's token shift: six mixes of every token with the one before it, by one kernel each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ROWS, BLOCK = 4, 256
"""Tokens and columns that a program holds at a time."""

PROGRAMS = 256
"""Programs of the backward pass for a block of columns: each adds up its share of the mixes' gradients."""


def token_shift_reference(x: Tensor, mixes: list[Tensor]) -> list[Tensor]:
    """``x + (before - x) mix`` for each of the mixes, where ``before`` is the token before, and zero for the first.

    Args:
        x: [B, T, size].
        mixes: six of [size].

    Returns:
        Six of [B, T, size], like ``x``.
    """
    delta = F.pad(x, (0, 0, 1, -1)) - x
    return [torch.addcmul(x, delta, mix.to(x.dtype)) for mix in mixes]


def token_shift(x: Tensor, mixes: list[Tensor]) -> list[Tensor]:
    """``token_shift_reference`` by a kernel."""
    return list(_TokenShift.apply(x, *mixes))


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
        x, mix = x.contiguous(), torch.stack(mixes)
        out = [torch.empty_like(x) for _ in mixes]
        rows, size = x.shape[0] * x.shape[1], x.shape[-1]
        grid = triton.cdiv(rows, ROWS), triton.cdiv(size, BLOCK)
        _forward[grid](x, mix, *out, rows, x.shape[1], SIZE=size, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(x, mix)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, mix = ctx.saved_tensors
        dx = torch.empty_like(x)
        rows, size = x.shape[0] * x.shape[1], x.shape[-1]
        programs = min(PROGRAMS, triton.cdiv(rows, ROWS))
        steps = triton.cdiv(rows, ROWS * programs)
        partial = x.new_empty(programs, *mix.shape, dtype=torch.float32)
        _backward[programs, triton.cdiv(size, BLOCK)](
            x, mix, *(grad.contiguous() for grad in grads), dx, partial, rows, x.shape[1], steps,
            SIZE=size, ROWS=ROWS, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        return dx, *partial.sum(0).to(mix.dtype).unbind()


@triton.jit
def _forward(x, mix, y0, y1, y2, y3, y4, y5, rows, length, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside, at = (row < rows) & (lane < SIZE), row * SIZE + lane
    here = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + at - SIZE, mask=inside & (row % length > 0), other=0.0).to(tl.float32)
    delta, out = before - here, (y0, y1, y2, y3, y4, y5)
    for i in tl.static_range(6):
        share = tl.load(mix + i * SIZE + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
        tl.store(out[i] + at, (here + delta * share).to(y0.dtype.element_ty), mask=inside)


@triton.jit
def _share(grad, mix, delta, at, inside, followed, SIZE: tl.constexpr):
    """What one mix gives to the gradient of the inputs, and to its own at every token."""
    here = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(grad + at + SIZE, mask=followed, other=0.0).to(tl.float32)
    return here + (after - here) * mix, here * delta


@triton.jit(do_not_specialize=["steps"])
def _backward(
    x, mix, g0, g1, g2, g3, g4, g5, dx, partial, rows, length, steps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    known = lane < SIZE
    m0 = tl.load(mix + lane, mask=known, other=0.0).to(tl.float32)
    m1 = tl.load(mix + SIZE + lane, mask=known, other=0.0).to(tl.float32)
    m2 = tl.load(mix + 2 * SIZE + lane, mask=known, other=0.0).to(tl.float32)
    m3 = tl.load(mix + 3 * SIZE + lane, mask=known, other=0.0).to(tl.float32)
    m4 = tl.load(mix + 4 * SIZE + lane, mask=known, other=0.0).to(tl.float32)
    m5 = tl.load(mix + 5 * SIZE + lane, mask=known, other=0.0).to(tl.float32)
    t0 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    t1, t2, t3, t4, t5 = t0, t0, t0, t0, t0
    for step in range(steps):
        row = ((tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside, at = (row < rows) & known, row * SIZE + lane
        # what a token gave to the one after it, within its sequence
        followed = inside & (row % length < length - 1)
        before = tl.load(x + at - SIZE, mask=inside & (row % length > 0), other=0.0).to(tl.float32)
        delta = before - tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d0, own0 = _share(g0, m0, delta, at, inside, followed, SIZE)
        d1, own1 = _share(g1, m1, delta, at, inside, followed, SIZE)
        d2, own2 = _share(g2, m2, delta, at, inside, followed, SIZE)
        d3, own3 = _share(g3, m3, delta, at, inside, followed, SIZE)
        d4, own4 = _share(g4, m4, delta, at, inside, followed, SIZE)
        d5, own5 = _share(g5, m5, delta, at, inside, followed, SIZE)
        t0, t1, t2, t3, t4, t5 = t0 + own0, t1 + own1, t2 + own2, t3 + own3, t4 + own4, t5 + own5
        tl.store(dx + at, (d0 + d1 + d2 + d3 + d4 + d5).to(dx.dtype.element_ty), mask=inside)
    to = partial + tl.program_id(0) * 6 * SIZE + lane
    tl.store(to, tl.sum(t0, 0)[None, :], mask=known)
    tl.store(to + SIZE, tl.sum(t1, 0)[None, :], mask=known)
    tl.store(to + 2 * SIZE, tl.sum(t2, 0)[None, :], mask=known)
    tl.store(to + 3 * SIZE, tl.sum(t3, 0)[None, :], mask=known)
    tl.store(to + 4 * SIZE, tl.sum(t4, 0)[None, :], mask=known)
    tl.store(to + 5 * SIZE, tl.sum(t5, 0)[None, :], mask=known)
