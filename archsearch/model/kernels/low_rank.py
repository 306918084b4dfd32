"""The second half of a low-rank projection inside a mixer's kernel: a few rows of it times a short vector."""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)
"""Columns a tile."""

SIGMOID, TANH = tl.constexpr(1), tl.constexpr(2)
"""Activations of the short vector other than none."""


@triton.jit
def load_low_rank(up, row, inside, RANK: tl.constexpr):
    """The rows ``row`` of ``up`` [rows, RANK], as a tuple of tiles: asked for before the vector is there."""
    tiles = ()
    for i in tl.static_range(triton.cdiv(RANK, CHUNK)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        mask = inside[:, None] & (column[None, :] < RANK)
        tiles = tiles + (tl.load(up + row[:, None] * RANK + column[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_low(low, RANK: tl.constexpr, ACTIVATION: tl.constexpr = 0):
    """The short vector at ``low``, activated, as a tuple of tiles in fp32."""
    tiles = ()
    for i in tl.static_range(triton.cdiv(RANK, CHUNK)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(low + column, mask=column < RANK, other=0.0).to(tl.float32)
        if ACTIVATION == SIGMOID:
            x = tl.sigmoid(x)
        if ACTIVATION == TANH:
            x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        tiles = tiles + (x,)
    return tiles


@triton.jit
def apply_low_rank(tiles, low, ROWS: tl.constexpr):
    """``up @ low``, [ROWS] in fp32."""
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(tiles[i].to(tl.float32) * low[i][None, :], 1)
    return total
