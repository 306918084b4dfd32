"""The WY representation of the delta rule's chunks (arXiv 2406.06484, section 3) by one kernel.

Inside a chunk the corrected values solve a unit lower triangular system. Its inverse is put together from those of
its blocks of 1, 2, 4 ... tokens: ``[[A, 0], [B, C]]`` has the inverse ``[[A', 0], [-C' B A', C']]``, as stable as
substitution and made of products. Of the way there nothing leaves the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.fused.chunks import CHUNK, grid, join, rates, rows, sizes, split


def wy_reference(k: Tensor, v: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``W = T beta K``, ``U = T beta V`` and ``T``, the inverse of ``I + tril(beta K K', -1)``, chunk by chunk.

    Args:
        k: [B, T, H, K], normalised.
        v: [B, T, H, V].
        logits: [B, T, H], ``beta`` before its sigmoid; more columns behind them do not count.

    Returns:
        Like ``k``, like ``v``, and [B, T, H, CHUNK]: each token's row of its chunk's inverse.
    """
    keys, values, rates = (split(t.float()) for t in (k, v, logits[..., : k.shape[2], None].float().sigmoid()))
    system = torch.eye(CHUNK, device=k.device) + (rates * keys @ keys.mT).tril(-1)
    inverse = torch.linalg.inv(system)
    w, u, inverse = (join(t, k.shape[1]) for t in (inverse @ (rates * keys), inverse @ (rates * values), inverse))
    return w, u, inverse


def wy(k: Tensor, v: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``wy_reference`` by a kernel, in the type of ``k``; ``k`` and ``v`` contiguous, ``logits`` a slice of tokens."""
    w, u = torch.empty_like(k), torch.empty_like(v)
    inverse = k.new_empty(*k.shape[:3], CHUNK)
    _wy[grid(k)](k, v, logits, w, u, inverse, k.shape[1], logits.stride(1), **sizes(k, v), C=CHUNK, num_warps=2)
    return w, u, inverse


@triton.jit
def _quarters(top_left, bottom_left, bottom_right):
    """[N, n, n] three times to [N, 2n, 2n], zeros in the fourth place."""
    N: tl.constexpr = top_left.shape[0]
    n: tl.constexpr = top_left.shape[1]
    top = tl.join(top_left, tl.zeros_like(top_left))
    bottom = tl.join(bottom_left, bottom_right)
    return tl.join(top, bottom).permute(0, 4, 1, 3, 2).reshape(N, 2 * n, 2 * n)


@triton.jit
def _product(a, b):
    """``a @ b`` as exact as fp32."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _inverse(x):
    """The inverses of ``I + x``, x [N, 16, 16], of which the strictly lower triangle counts."""
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    found = tl.where(row == column, 1.0, 0.0) - tl.where((row // 2 == column // 2) & (row > column), x, 0.0)
    for level in tl.static_range(3):
        size = 2 << level
        below = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        found -= _product(_product(found, tl.where(below, x, 0.0)), found)
    return found


@triton.jit
def _wy(
    k, v, logits, w, u, inverse, T, stride,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = batch * T * H + head
    k, w, v, u = k + first * K, w + first * K, v + first * V, u + first * V
    logits, inverse = logits + batch * T * stride + head, inverse + first * C
    begin = tl.program_id(0) * C
    n = tl.arange(0, 16)
    # of beta K K' first the blocks on the diagonal
    token = begin + 16 * tl.arange(0, 4)[:, None] + n[None, :]
    x = rows(k, token, T, H * K, K, BK)
    blocks = _inverse(rates(logits, token, T, stride)[:, :, None] * tl.dot(x, x.permute(0, 2, 1)))
    early, late = blocks.reshape(2, 2, 16, 16).permute(0, 2, 3, 1).split()
    # those between each two of them
    token = begin + 32 * tl.arange(0, 2)[:, None] + n[None, :]
    beside = tl.dot(rows(k, token + 16, T, H * K, K, BK), rows(k, token, T, H * K, K, BK).permute(0, 2, 1))
    beside *= rates(logits, token + 16, T, stride)[:, :, None]
    beside = _product(_product(late, beside), early)
    early, late = _quarters(early, -beside, late).permute(1, 2, 0).split()
    # and the lower left quarter
    token = begin + tl.arange(0, C // 2)
    beside = tl.dot(rows(k, token + C // 2, T, H * K, K, BK), rows(k, token, T, H * K, K, BK).trans())
    beside *= rates(logits, token + C // 2, T, stride)[:, None]
    beside = _product(_product(late, beside), early)
    solved = _quarters(early[None], -beside[None], late[None]).reshape(C, C).to(k.dtype.element_ty)

    token = begin + tl.arange(0, C)
    rate = rates(logits, token, T, stride)[:, None]
    at, inside = token[:, None], token[:, None] < T
    tl.store(inverse + at * H * C + tl.arange(0, C)[None, :], solved, mask=inside)
    lane = tl.arange(0, BK)[None, :]
    found = tl.dot(solved, (rows(k, token, T, H * K, K, BK) * rate).to(solved.dtype))
    tl.store(w + at * H * K + lane, found.to(solved.dtype), mask=inside & (lane < K))
    lane = tl.arange(0, BV)[None, :]
    found = tl.dot(solved, (rows(v, token, T, H * V, V, BV) * rate).to(solved.dtype))
    tl.store(u + at * H * V + lane, found.to(solved.dtype), mask=inside & (lane < V))
