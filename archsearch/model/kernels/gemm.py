"""Projections of one token of several sequences: cuBLAS on the tensor cores, between kernels of ours.

From two sequences on, products of matrices are what a library does best (measured on an H100 at 2 to 256 sequences:
no Triton kernel of ours came near). What it cannot do stands around it: the norm before, the gate or the largest
logits behind. The residual is added by the product itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.kernels.common import launch, power_of_two, silu, wait

GATE_BLOCK, LOGIT_BLOCK = 1024, 4096
"""Numbers a program."""


@triton.jit
def norm_kernel(x, gain, squares, out, eps, K: tl.constexpr, K_BLOCK: tl.constexpr, GROUP: tl.constexpr,
                PARTS: tl.constexpr, GAIN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """RMSNorm of one sequence: with its gain, or, without one, from the parts of the mean square of each group."""
    sequence, column = tl.program_id(0).to(tl.int64), tl.arange(0, K_BLOCK)
    inside = column < K
    gains = tl.full([K_BLOCK], 1.0, tl.float32)
    if GAIN:
        gains = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    y = tl.load(x + sequence * K + column, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        y *= tl.rsqrt(tl.sum(y * y) / K + eps) * gains
    else:
        mean = tl.zeros([K_BLOCK], tl.float32)
        for part in range(PARTS):
            address = squares + (sequence * (K // GROUP) + column // GROUP) * PARTS + part
            mean += tl.load(address, mask=inside, other=0.0)
        y *= tl.rsqrt(mean + eps)
    tl.store(out + sequence * K + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(both, out, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """SwiGLU: the first half of each row, through SiLU, times the second."""
    sequence = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    gate = tl.load(both + sequence * 2 * N + column, mask=column < N, other=0.0).to(tl.float32)
    up = tl.load(both + sequence * 2 * N + N + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out + sequence * N + column, (silu(gate) * up).to(out.dtype.element_ty), mask=column < N)


@triton.jit
def best_kernel(logits, best, best_row, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The largest logit of a part of the vocabulary, and the first row that has it."""
    part, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = part * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    value = tl.load(logits + sequence * N + row, mask=row < N, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    address = sequence * tl.num_programs(0) + part
    tl.store(best + address, top)
    tl.store(best_row + address, tl.min(tl.where(value == top, row, N), 0))


def normalize(x: Tensor, gain: Tensor | None, squares: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of each row of ``x`` [B, K]: with ``gain`` [K], or from ``squares`` [B, groups, parts]."""
    batch, k = x.shape
    groups, parts = (1, 1) if squares is None else squares.shape[1:]
    out = torch.empty_like(x)
    sizes = {"K": k, "K_BLOCK": power_of_two(k), "GROUP": k // groups, "PARTS": parts, "GAIN": gain is not None}
    launch(norm_kernel, (batch,), x, x, x if gain is None else gain, x if squares is None else squares, out, eps,
           **sizes, warps=8)  # fmt: skip
    return out


def gate(both: Tensor, out: Tensor) -> None:
    """``out`` [B, N] = silu(first half of ``both`` [B, 2 N]) * second half."""
    batch, n = out.shape
    launch(gate_kernel, (triton.cdiv(n, GATE_BLOCK), batch), out, both, out, n, BLOCK=GATE_BLOCK)


def largest(logits: Tensor, best: Tensor, best_row: Tensor) -> None:
    """The largest of each ``LOGIT_BLOCK`` logits [B, V], and where it is, in ``best`` and ``best_row`` [B, parts]."""
    batch, n = logits.shape
    launch(best_kernel, (best.shape[1], batch), logits, logits, best, best_row, n, BLOCK=LOGIT_BLOCK, warps=8)
