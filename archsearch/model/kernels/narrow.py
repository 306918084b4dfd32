"""Projections of one token of a few sequences: the weights in registers as in ``gemv.py``, on the tensor cores.

A projection of a small batch is bound by reading its weights, like that of one sequence, so each program again holds
rows and asks for them before it waits for the kernel that makes its input.
"""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from archsearch.model.kernels.common import power_of_two, silu, wait
from archsearch.model.kernels.gemm import SMALLEST, chunk_of
from archsearch.model.kernels.gemv import GATED, LOGITS, RESIDUAL

MOST = 32
"""Sequences up to which this kernel is used."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: ``rows`` outputs a program, ``chunk`` columns a product, ``depth`` columns ahead."""

    batch: int
    rows: int
    chunk: int
    depth: int
    warps: int


def narrow_shape(batch: int, n: int, k: int, group: int | None = None, gated: bool = False) -> Tile:
    """The cut for an [n, k] matrix. Raises EnvironmentUnfit as ``chunk_of`` does."""
    depth, chunk = 512 if gated else 1024, chunk_of(128, k, group)
    return Tile(max(SMALLEST, power_of_two(batch)), 16, chunk, max(chunk, min(depth, power_of_two(k))), 4)


@triton.jit
def load_weights(weight, rows, N, START: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr):
    """Columns from START on of ``rows`` as a tuple of tiles [ROWS, CHUNK]; none beyond K."""
    tiles = ()
    for i in tl.static_range(DEPTH // CHUNK):
        if START + i * CHUNK < K:
            columns = START + i * CHUNK + tl.arange(0, CHUNK)
            inside = rows[:, None] < N
            if K % CHUNK != 0:
                inside = inside & (columns[None, :] < K)
            address = weight + rows[:, None].to(tl.int64) * K + columns[None, :]
            tiles = tiles + (tl.load(address, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def load_inputs(x, batch, B, START: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """The inputs of a chunk of columns, [CHUNK, BATCH]."""
    columns = START + tl.arange(0, CHUNK)
    inside = (batch[None, :] < B) & (columns[:, None] < K)
    return tl.load(x + batch[None, :].to(tl.int64) * K + columns[:, None], mask=inside, other=0.0)


@triton.jit
def narrow_kernel(x, gain, squares, weight, bias, out, best, best_row, N, B, eps,
                  K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
                  BATCH_BLOCK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
                  GAIN: tl.constexpr, SQUARES: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One tile [ROWS, BATCH_BLOCK] of ``epilogue(weight @ norm(x).T + bias)``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, part = tl.arange(0, BATCH_BLOCK), tl.arange(0, PARTS_BLOCK)
    total = tl.zeros([ROWS, BATCH_BLOCK], tl.float32)
    gate = tl.zeros([ROWS, BATCH_BLOCK], tl.float32)
    square = tl.zeros([BATCH_BLOCK], tl.float32)
    above = weight + N.to(tl.int64) * K
    tiles = load_weights(weight, rows, N, 0, K, CHUNK, DEPTH)
    ups = tiles
    if EPILOGUE == GATED:
        ups = load_weights(above, rows, N, 0, K, CHUNK, DEPTH)
    wait(PDL)
    following = load_inputs(x, batch, B, 0, K, CHUNK)
    for begin in tl.static_range(0, K, DEPTH):
        # the next weights are on their way while these are used
        next_tiles = load_weights(weight, rows, N, begin + DEPTH, K, CHUNK, DEPTH)
        next_ups = next_tiles
        if EPILOGUE == GATED:
            next_ups = load_weights(above, rows, N, begin + DEPTH, K, CHUNK, DEPTH)
        for i in tl.static_range(len(tiles)):
            tile = following
            if begin + (i + 1) * CHUNK < K:
                following = load_inputs(x, batch, B, begin + (i + 1) * CHUNK, K, CHUNK)
            if GAIN:
                columns = begin + i * CHUNK + tl.arange(0, CHUNK)
                exact = tile.to(tl.float32)
                square += tl.sum(exact * exact, 0)
                gains = tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
                tile = (exact * gains[:, None]).to(tile.dtype)
            if SQUARES:
                group = (begin + i * CHUNK) // GROUP
                parts = squares + (batch[:, None] * (K // GROUP) + group) * PARTS + part[None, :]
                mean = tl.sum(tl.load(parts, mask=(batch[:, None] < B) & (part[None, :] < PARTS), other=0.0), 1)
                tile = (tile.to(tl.float32) * tl.rsqrt(mean + eps)[None, :]).to(tile.dtype)
            total = tl.dot(tiles[i], tile, total, input_precision="ieee")
            if EPILOGUE == GATED:
                gate = tl.dot(ups[i], tile, gate, input_precision="ieee")
        tiles, ups = next_tiles, next_ups
    if GAIN:
        scale = tl.rsqrt(square / K + eps)[None, :]
        total *= scale
        gate *= scale
    inside = (rows[:, None] < N) & (batch[None, :] < B)
    if BIAS:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == GATED:
        total = silu(total) * gate
    address = out + batch[None, :].to(tl.int64) * N + rows[:, None]
    if EPILOGUE == RESIDUAL:
        total += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(address, total.to(out.dtype.element_ty), mask=inside)
    if EPILOGUE == LOGITS:
        # the largest of the logits as stored, so that equals are equal
        total = tl.where(inside, total.to(out.dtype.element_ty).to(tl.float32), float("-inf"))
        top = tl.max(total, 0)
        first = tl.min(tl.where(total == top[None, :], rows[:, None], N), 0)
        address = batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + address, top, mask=batch < B)
        tl.store(best_row + address, first, mask=batch < B)
