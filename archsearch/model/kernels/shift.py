"""Projections of one token behind a token shift: each block of rows reads its own mix of a token and the one before.

The normalised inputs of the last two tokens are kept in a ring [B, 2, hidden], that of position p in slot p mod 2.
"""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, wait
from archsearch.model.kernels.gemv import load_rows, load_vector, multiply

BLOCK = 16
"""Rows that share a mix: the least that the tensor cores take."""


@dataclass(frozen=True, slots=True)
class Shift:
    """How a token and the one before are mixed.

    Attributes:
        mixes: [M, hidden], the share of the token before.
        block_mix: [rows / BLOCK] in int32, the mix that each block of rows reads.
        ring: [B, 2, hidden], changed in place.
    """

    mixes: Tensor
    block_mix: Tensor
    ring: Tensor


@triton.jit
def shift_gemv_kernel(x, gain, mixes, block_mix, ring, position, weight, out, N, eps, K: tl.constexpr,
                      ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """ROWS rows for one sequence."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = load_rows(weight, rows, N, K, CHUNK)
    gains = load_vector(gain, K, CHUNK)
    shares = load_vector(mixes + tl.load(block_mix + tl.program_id(0) * ROWS // BLOCK_ROWS) * K, K, CHUNK)
    here = tl.load(position, cache_modifier=".cg")
    before = load_vector(ring + (here + 1) % 2 * K, K, CHUNK)
    wait(PDL)
    vector = load_vector(x, K, CHUNK)
    square = tl.zeros([1, CHUNK], tl.float32)
    for i in tl.static_range(len(vector)):
        square += vector[i] * vector[i]
    scale = tl.rsqrt(tl.sum(square) / K + eps)
    mixed = ()
    for i in tl.static_range(len(vector)):
        normed = vector[i] * gains[i] * scale
        mixed = mixed + (normed + (before[i] - normed) * shares[i],)
        if tl.program_id(0) == 0:
            columns = i * CHUNK + tl.arange(0, CHUNK)[None, :]
            tl.store(ring + here % 2 * K + columns, normed.to(ring.dtype.element_ty), mask=columns < K)
    tl.store(out + rows, multiply(tiles, mixed, ROWS, CHUNK).to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def shift_gemm_kernel(x, gain, mixes, block_mix, ring, position, weight, out, N, B, eps, K: tl.constexpr,
                      ROWS: tl.constexpr, CHUNK: tl.constexpr, BATCH_BLOCK: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """One block of rows for BATCH_BLOCK sequences."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH_BLOCK + tl.arange(0, BATCH_BLOCK)
    here = tl.load(position, cache_modifier=".cg")
    share_at = mixes + tl.load(block_mix + tl.program_id(0)) * K
    first = tl.program_id(0) == 0
    square = tl.zeros([BATCH_BLOCK], tl.float32)
    total = tl.zeros([BATCH_BLOCK, ROWS], tl.float32)
    wait(PDL)
    for start in tl.range(0, K, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        own = (batch[:, None] < B) & (columns[None, :] < K)
        token = tl.load(x + batch[:, None] * K + columns[None, :], mask=own, other=0.0).to(tl.float32)
        square += tl.sum(token * token, 1)
    scale = tl.rsqrt(square / K + eps)
    for start in tl.range(0, K, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        inside = columns < K
        own = (batch[:, None] < B) & inside[None, :]
        token = tl.load(x + batch[:, None] * K + columns[None, :], mask=own, other=0.0).to(tl.float32)
        gains = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
        shares = tl.load(share_at + columns, mask=inside, other=0.0).to(tl.float32)
        cell = ring + batch[:, None] * 2 * K + columns[None, :]
        before = tl.load(cell + (here + 1) % 2 * K, mask=own, other=0.0, cache_modifier=".cg").to(tl.float32)
        normed = token * gains[None, :] * scale[:, None]
        tl.store(cell + here % 2 * K, normed.to(ring.dtype.element_ty), mask=own & first)
        mixed = normed + (before - normed) * shares[None, :]
        address = weight + rows[None, :].to(tl.int64) * K + columns[:, None]
        tile = tl.load(address, mask=(rows[None, :] < N) & inside[:, None], other=0.0)
        total = tl.dot(mixed.to(tile.dtype), tile, total, input_precision="ieee")
    written = (batch[:, None] < B) & (rows[None, :] < N)
    tl.store(out + batch[:, None] * N + rows[None, :], total.to(out.dtype.element_ty), mask=written)


def shift_project(x: Tensor, gain: Tensor, eps: float, shift: Shift, position: Tensor, weight: Tensor,
                  out: Tensor) -> None:  # fmt: skip
    """``out = weight @ (n + (before - n) mix)`` with ``n = RMSNorm(x)``, each block of rows with its own mix.

    Args:
        x: [B, K].
        gain: [K] of the norm.
        eps: of the norm.
        shift: mixes, and what the last token was.
        position: [] in int64, tokens before this one.
        weight: [N, K], N a multiple of BLOCK.
        out: [B, N], written.
    """
    (batch, k), n = x.shape, out.shape[1]
    tensors = x, gain, shift.mixes, shift.block_mix, shift.ring, position, weight, out
    if batch == 1:
        sizes = {"K": k, "ROWS": 4, "CHUNK": min(512, power_of_two(k)), "BLOCK_ROWS": BLOCK}
        launch(shift_gemv_kernel, (triton.cdiv(n, 4),), x, *tensors, n, eps, **sizes, warps=4)
        return
    block = min(64, max(16, power_of_two(batch)))
    sizes = {"K": k, "ROWS": BLOCK, "CHUNK": 128, "BATCH_BLOCK": block}
    grid = triton.cdiv(n, BLOCK), triton.cdiv(batch, block)
    launch(shift_gemm_kernel, grid, x, *tensors, n, batch, eps, **sizes, warps=4)


def shift_project_reference(x: Tensor, gain: Tensor, eps: float, shift: Shift, position: Tensor, weight: Tensor,
                            out: Tensor) -> None:  # fmt: skip
    """``shift_project`` in plain torch."""
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps) * gain.float()
    slots = (position + torch.arange(2, device=x.device)) % 2
    before = shift.ring.index_select(1, slots[1:])[:, 0].float()
    mixed = normed[:, None] + (before - normed)[:, None] * shift.mixes.float()
    blocks = torch.einsum("bmk,nrk->bmnr", mixed, weight.float().unflatten(0, (-1, BLOCK)))
    which = shift.block_mix.long()
    out.copy_(blocks[:, which, torch.arange(len(which), device=x.device)].flatten(1))
    shift.ring.index_copy_(1, slots[:1], normed[:, None].to(shift.ring.dtype))
