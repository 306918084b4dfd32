"""Projections of one token of several sequences on the tensor cores: as ``gemv.py``, for batches of two and more."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from archsearch.errors import EnvironmentUnfit
from archsearch.model.kernels.common import power_of_two, power_of_two_in, silu, wait
from archsearch.model.kernels.gemv import GATED, LOGITS, RESIDUAL

SMALLEST = 16
"""The least extent of a tile that the tensor cores take."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: ``batch`` sequences by ``rows`` outputs, ``chunk`` columns a step."""

    batch: int
    rows: int
    chunk: int
    warps: int
    stages: int


def chunk_of(most: int, k: int, group: int | None) -> int:
    """Columns a product, at most ``most``: a chunk lies in one ``group`` of columns that share a norm.

    Raises:
        EnvironmentUnfit: groups so odd that no chunk of 16 columns fits into them.
    """
    if group in (None, k):
        return most
    chunk = min(most, power_of_two_in(group))
    if chunk < SMALLEST:
        raise EnvironmentUnfit(
            f"norm groups of {group} channels do not fit the tensor cores", "choose a multiple of 16 or batch 1"
        )
    return chunk


def gemm_shape(batch: int, n: int, k: int, group: int | None = None) -> Tile:
    """The cut for an [n, k] matrix and a batch. Raises EnvironmentUnfit as ``chunk_of`` does."""
    rows = 32 if n < 4096 else 64
    return Tile(min(64, max(SMALLEST, power_of_two(batch))), rows, chunk_of(64, k, group), 4, 4)


@triton.jit
def gemm_kernel(x, gain, squares, weight, bias, out, best, best_row, N, B, eps,
                K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BATCH_BLOCK: tl.constexpr,
                GROUP: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, GAIN: tl.constexpr,
                SQUARES: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One tile [BATCH_BLOCK, ROWS] of ``epilogue(norm(x) @ weight.T + bias)``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH_BLOCK + tl.arange(0, BATCH_BLOCK)
    part = tl.arange(0, PARTS_BLOCK)
    total = tl.zeros([BATCH_BLOCK, ROWS], tl.float32)
    gate = tl.zeros([BATCH_BLOCK, ROWS], tl.float32)
    square = tl.zeros([BATCH_BLOCK], tl.float32)
    wait(PDL)
    for start in tl.range(0, K, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        own = (batch[:, None] < B) & (columns[None, :] < K)
        tile = tl.load(x + batch[:, None] * K + columns[None, :], mask=own, other=0.0)
        if GAIN:
            exact = tile.to(tl.float32)
            square += tl.sum(exact * exact, 1)
            gains = tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
            tile = (exact * gains[None, :]).to(tile.dtype)
        if SQUARES:
            parts = squares + (batch[:, None] * (K // GROUP) + start // GROUP) * PARTS + part[None, :]
            mean = tl.sum(tl.load(parts, mask=(batch[:, None] < B) & (part[None, :] < PARTS), other=0.0), 1)
            tile = (tile.to(tl.float32) * tl.rsqrt(mean + eps)[:, None]).to(tile.dtype)
        address = weight + rows[None, :].to(tl.int64) * K + columns[:, None]
        inside = (rows[None, :] < N) & (columns[:, None] < K)
        total = tl.dot(tile, tl.load(address, mask=inside, other=0.0), total, input_precision="ieee")
        if EPILOGUE == GATED:
            up = tl.load(address + N.to(tl.int64) * K, mask=inside, other=0.0)
            gate = tl.dot(tile, up, gate, input_precision="ieee")
    if GAIN:
        scale = tl.rsqrt(square / K + eps)[:, None]
        total *= scale
        gate *= scale
    inside = (batch[:, None] < B) & (rows[None, :] < N)
    if BIAS:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == GATED:
        total = silu(total) * gate
    address = out + batch[:, None].to(tl.int64) * N + rows[None, :]
    if EPILOGUE == RESIDUAL:
        total += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(address, total.to(out.dtype.element_ty), mask=inside)
    if EPILOGUE == LOGITS:
        # the largest of the logits as stored, so that equals are equal
        total = tl.where(inside, total.to(out.dtype.element_ty).to(tl.float32), float("-inf"))
        top = tl.max(total, 1)
        first = tl.min(tl.where(total == top[:, None], rows[None, :], N), 1)
        address = batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + address, top, mask=batch < B)
        tl.store(best_row + address, first, mask=batch < B)
