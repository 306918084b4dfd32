"""What follows inside each chunk of the delta rule from the gradients of its memories, by one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.fused.chunks import CHUNK, grid, rates, rows, sizes


def chunk_gradient(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, inverse: Tensor, new: Tensor, states: Tensor,
    do: Tensor, d_new: Tensor, d_states: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``q``, ``k``, ``v`` and ``logits``.

    Args:
        q: [B, T, H, K], as are ``k`` and, with V, ``v``, ``new``, ``do``, ``d_new``.
        k: keys, normalised.
        v: values.
        logits: [B, T, at least H], the rates before their sigmoid.
        inverse: what ``wy`` gave.
        new: the corrected values.
        states: [B, chunks, H, K, V], the memory before each chunk.
        do: gradient of the outputs.
        d_new: of the corrected values.
        d_states: of the memory behind each chunk.
        scale: of the outputs.
    """
    dq, dk, dv, d_logits = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(logits)
    _chunk_gradient[grid(k)](
        q, k, v, logits, inverse, new, states, do, d_new, d_states, dq, dk, dv, d_logits,
        scale, k.shape[1], logits.stride(1), d_logits.stride(1), **sizes(k, v), C=CHUNK, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, d_logits


@triton.jit
def _chunk_gradient(
    q, k, v, logits, inverse, new, states, do, d_new, d_states, dq, dk, dv, d_logits, scale, T, stride, to_stride,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = batch * T * H + head
    at = ((batch * tl.num_programs(0) + tl.program_id(0)) * H + head) * K * V
    token, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, C)
    known, inside = token < T, token[:, None] < T
    dtype = k.dtype.element_ty
    rate = rates(logits + batch * T * stride + head, token, T, stride)
    solved = tl.load(inverse + first * C + token[:, None] * H * C + column[None, :], mask=inside, other=0.0)
    # through U
    g, x = rows(d_new + first * V, token, T, H * V, V, BV), rows(v + first * V, token, T, H * V, V, BV)
    back = tl.dot(solved.trans(), g)
    d_solved = tl.dot(g, (x * rate[:, None]).to(dtype).trans())
    to_rate = tl.sum(back * x.to(tl.float32), 1)
    lane = tl.arange(0, BV)[None, :]
    to = dv + first * V + token[:, None] * H * V + lane
    tl.store(to, (back * rate[:, None]).to(dtype), mask=inside & (lane < V))
    # through the outputs and the memory's update
    y, x = rows(do + first * V, token, T, H * V, V, BV), rows(new + first * V, token, T, H * V, V, BV)
    scores = tl.where(column[:, None] >= column[None, :], tl.dot(y, x.trans()), 0.0).to(dtype)
    channel = tl.arange(0, BK)
    state = rows(states + at, channel, K, V, V, BV).trans()
    to_w = (-tl.dot(g, state)).to(dtype)
    key = rows(k + first * K, token, T, H * K, K, BK)
    lane = channel[None, :]
    to, inside = first * K + token[:, None] * H * K + lane, inside & (lane < K)
    tl.store(dq + to, (tl.dot(scores, key, tl.dot(y, state)) * scale).to(dtype), mask=inside)
    found = tl.dot(scores.trans(), rows(q + first * K, token, T, H * K, K, BK)) * scale
    found = tl.dot(x, rows(d_states + at, channel, K, V, V, BV).trans(), found)
    # through W, and through the inverse T, whose gradient passes on as -T' dT T'
    scaled = (key * rate[:, None]).to(dtype)
    d_solved = tl.where(column[:, None] > column[None, :], tl.dot(to_w, scaled.trans(), d_solved), 0.0).to(dtype)
    d_solved = tl.dot(solved.trans(), tl.dot(d_solved, solved.trans()).to(dtype))
    d_solved = tl.where(column[:, None] > column[None, :], -d_solved, 0.0).to(dtype)
    back = tl.dot(d_solved, key, tl.dot(solved.trans(), to_w))
    to_rate += tl.sum(back * key.to(tl.float32), 1)
    found = tl.dot(d_solved.trans(), scaled, found + back * rate[:, None])
    tl.store(dk + to, found.to(dtype), mask=inside)
    to = d_logits + (batch * T + token) * to_stride + head
    tl.store(to, (to_rate * rate * (1 - rate)).to(d_logits.dtype.element_ty), mask=known)
