"""The read-out of the delta rule's memory and the RMSNorm of its heads in one kernel, and in one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.fused.chunks import CHUNK, grid, join, rows, sizes, split


def read_out_reference(
    q: Tensor, k: Tensor, new: Tensor, states: Tensor, gain: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """``(Q S + tril(Q K') new) scale`` chunk by chunk, and its norm over each head.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        new: [B, T, H, V], the corrected values.
        states: [B, chunks, H, K, V], the memory before each chunk.
        gain: [V], of the norm.
        scale: of the outputs.
        eps: of the norm.
    """
    queries, keys, values = (split(t.float()) for t in (q, k, new))
    o = (queries @ states.float().transpose(1, 2) + (queries @ keys.mT).tril() @ values) * scale
    o = join(o, q.shape[1]).to(q.dtype)
    return o, F.rms_norm(o.float(), gain.shape, gain.float(), eps).to(q.dtype)


def read_out(
    q: Tensor, k: Tensor, new: Tensor, states: Tensor, gain: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """``read_out_reference`` by a kernel; everything contiguous."""
    o, normed = torch.empty_like(new), torch.empty_like(new)
    _read_out[grid(k)](
        q, k, new, states, gain, o, normed, scale, eps, k.shape[1], **sizes(k, new), C=CHUNK, num_warps=4
    )
    return o, normed


def read_out_gradient(
    q: Tensor, k: Tensor, o: Tensor, gain: Tensor, grad: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the norm: those of ``o``, of ``new`` as far as its own chunk reads it, and of ``gain``."""
    do, d_new = torch.empty_like(o), torch.empty_like(o)
    at = grid(k)
    partial = torch.empty(at[0] * at[1], len(gain), device=o.device, dtype=torch.float32)
    _read_out_gradient[at](
        q, k, o, gain, grad, do, d_new, partial, scale, eps, k.shape[1], **sizes(k, o), C=CHUNK, num_warps=8
    )
    return do, d_new, partial.sum(0).to(gain.dtype)


@triton.jit
def _read_out(
    q, k, new, states, gain, o, normed, scale, eps, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = batch * T * H + head
    at = ((batch * tl.num_programs(0) + tl.program_id(0)) * H + head) * K * V
    token, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, C)
    query, key = rows(q + first * K, token, T, H * K, K, BK), rows(k + first * K, token, T, H * K, K, BK)
    scores = tl.where(column[:, None] >= column[None, :], tl.dot(query, key.trans()), 0.0).to(q.dtype.element_ty)
    found = tl.dot(query, rows(states + at, tl.arange(0, BK), K, V, V, BV))
    found = tl.dot(scores, rows(new + first * V, token, T, H * V, V, BV), found) * scale
    lane = tl.arange(0, BV)[None, :]
    inside, place = (token[:, None] < T) & (lane < V), first * V + token[:, None] * H * V + lane
    # the norm is of the outputs as they are kept, so that the backward pass sees the same numbers
    kept = found.to(o.dtype.element_ty)
    tl.store(o + place, kept, mask=inside)
    value = kept.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / V + eps)[:, None]
    value *= tl.load(gain + lane, mask=lane < V, other=0.0).to(tl.float32)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _read_out_gradient(
    q, k, o, gain, grad, do, d_new, partial, scale, eps, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = batch * T * H + head
    token, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, C)
    lane = tl.arange(0, BV)[None, :]
    inside, place = (token[:, None] < T) & (lane < V), first * V + token[:, None] * H * V + lane
    value = tl.load(o + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.rsqrt(tl.sum(value * value, 1) / V + eps)[:, None]
    value *= length
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + row * V + lane, tl.sum(g * value, 0)[None, :], mask=lane < V)
    g *= tl.load(gain + lane, mask=lane < V, other=0.0).to(tl.float32)
    g = (length * (g - value * (tl.sum(g * value, 1) / V)[:, None])).to(do.dtype.element_ty)
    tl.store(do + place, g, mask=inside)
    query, key = rows(q + first * K, token, T, H * K, K, BK), rows(k + first * K, token, T, H * K, K, BK)
    scores = tl.where(column[:, None] <= column[None, :], tl.dot(key, query.trans()), 0.0).to(q.dtype.element_ty)
    tl.store(d_new + place, (tl.dot(scores, g) * scale).to(d_new.dtype.element_ty), mask=inside)
