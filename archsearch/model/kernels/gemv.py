"""Projections of one token: norm, matrix-vector product and epilogue in one kernel; and the LM head.

At batch 1 a projection is bound by reading its weights, so each program holds a few rows, asks for all of
them before it waits for the kernel that makes its input, and normalises the input itself.
``gemm.py`` is for larger batches.
"""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from archsearch.model.kernels.common import power_of_two, power_of_two_in, silu, wait

GATED, RESIDUAL, LOGITS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Epilogues other than a plain store: SwiGLU of two halves; add to what is there; keep the largest."""


THREAD_WEIGHTS = 384
"""Weights that a thread may hold: 192 registers in bf16."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a matrix is cut: ``rows`` a step and ``steps`` a program, in ``chunk`` columns a load."""

    rows: int
    steps: int
    chunk: int
    warps: int


def gemv_shape(n: int, k: int, gated: bool = False, logits: bool = False, group: int | None = None) -> Cut:
    """The cut of an [n, k] matrix. The ``group`` of columns that share a norm and a chunk: one divides the other."""
    rows, steps, chunk, warps = (8, 2, 1024, 4) if logits else (2 if gated and k >= 2048 else 4, 1, 512, 2)
    if k * rows * (1 + gated) > THREAD_WEIGHTS * 32 * warps:
        warps = 4
    while rows > 1 and k * rows * (1 + gated) > THREAD_WEIGHTS * 32 * warps:
        rows //= 2
    chunk = min(chunk, power_of_two(k))
    if group not in (None, k) and (group > chunk or group & (group - 1)):
        chunk = min(chunk, power_of_two_in(group))
    return Cut(rows, steps, chunk, warps)


@triton.jit
def load_rows(weight, rows, N, K: tl.constexpr, CHUNK: tl.constexpr):
    """The ``rows`` of an [N, K] matrix as a tuple of tiles of CHUNK columns."""
    tiles = ()
    for i in tl.static_range(triton.cdiv(K, CHUNK)):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        inside = rows[:, None] < N
        if K % CHUNK != 0:
            inside = inside & (columns[None, :] < K)
        address = weight + rows[:, None].to(tl.int64) * K + columns[None, :]
        tiles = tiles + (tl.load(address, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def load_vector(x, K: tl.constexpr, CHUNK: tl.constexpr):
    """A vector [K] as a tuple of tiles [1, CHUNK] in fp32."""
    tiles = ()
    for i in tl.static_range(triton.cdiv(K, CHUNK)):
        columns = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        tiles = tiles + (tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def group_scale(squares, eps, i: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
                PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):  # fmt: skip
    """1 / rms of the group of each column of chunk ``i``: a scalar or [1, CHUNK]."""
    part = tl.arange(0, PARTS_BLOCK)
    if GROUP >= CHUNK or GROUP == K:
        group = i * CHUNK // GROUP
        mean = tl.sum(tl.load(squares + group * PARTS + part, mask=part < PARTS, other=0.0))
        scale = tl.rsqrt(mean + eps)
    else:
        count: tl.constexpr = CHUNK // GROUP
        groups = i * count + tl.arange(0, count)
        inside = (groups[:, None] < K // GROUP) & (part[None, :] < PARTS)
        means = tl.sum(tl.load(squares + groups[:, None] * PARTS + part[None, :], mask=inside, other=0.0), 1)
        scale = tl.reshape(tl.broadcast_to(tl.rsqrt(means + eps)[:, None], [count, GROUP]), [1, CHUNK])
    return scale


@triton.jit
def multiply(tiles, vector, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows times vector, [ROWS] in fp32."""
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(len(tiles)):
        total += tiles[i].to(tl.float32) * vector[i]
    return tl.sum(total, 1)


@triton.jit
def gemv_kernel(x, gain, squares, weight, bias, out, best, best_row, N, eps,
                K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
                PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, GAIN: tl.constexpr, SQUARES: tl.constexpr,
                BIAS: tl.constexpr, EPILOGUE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows ``ROWS * STEPS * program`` onwards of ``epilogue(weight @ norm(x) + bias)``."""
    rows = tl.program_id(0) * (ROWS * STEPS) + tl.arange(0, ROWS)
    tiles = load_rows(weight, rows, N, K, CHUNK)
    if EPILOGUE == GATED:
        ups = load_rows(weight + N.to(tl.int64) * K, rows, N, K, CHUNK)
    if GAIN:
        gains = load_vector(gain, K, CHUNK)
    wait(PDL)
    vector = load_vector(x, K, CHUNK)
    scale = 1.0
    if GAIN:
        square = tl.zeros([1, CHUNK], tl.float32)
        gained = ()
        for i in tl.static_range(len(vector)):
            square += vector[i] * vector[i]
            gained = gained + (vector[i] * gains[i],)
        scale = tl.rsqrt(tl.sum(square) / K + eps)
        vector = gained
    if SQUARES and GROUP == K:
        scale = group_scale(squares, eps, 0, K, CHUNK, GROUP, PARTS, PARTS_BLOCK)
    if SQUARES and GROUP < K:
        scaled = ()
        for i in tl.static_range(len(vector)):
            scaled = scaled + (vector[i] * group_scale(squares, eps, i, K, CHUNK, GROUP, PARTS, PARTS_BLOCK),)
        vector = scaled
    if EPILOGUE == LOGITS:
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        highest_row = rows
    for step in tl.static_range(STEPS):
        inside = rows < N
        if step + 1 < STEPS:
            following = load_rows(weight, rows + ROWS, N, K, CHUNK)
        y = multiply(tiles, vector, ROWS, CHUNK) * scale
        if BIAS:
            y += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        if EPILOGUE == GATED:
            y = silu(y) * multiply(ups, vector, ROWS, CHUNK) * scale
            if step + 1 < STEPS:
                ups = load_rows(weight + N.to(tl.int64) * K, rows + ROWS, N, K, CHUNK)
        if EPILOGUE == RESIDUAL:
            y += tl.load(out + rows, mask=inside, other=0.0).to(tl.float32)
        if EPILOGUE == LOGITS:
            # the largest of the logits as stored, so that equals are equal
            y = y.to(out.dtype.element_ty).to(tl.float32)
            better = inside & (y > highest)
            highest = tl.where(better, y, highest)
            highest_row = tl.where(better, rows, highest_row)
        tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)
        rows += ROWS
        if step + 1 < STEPS:
            tiles = following
    if EPILOGUE == LOGITS:
        top = tl.max(highest, 0)
        tl.store(best + tl.program_id(0), top)
        tl.store(best_row + tl.program_id(0), tl.min(tl.where(highest == top, highest_row, N), 0))
