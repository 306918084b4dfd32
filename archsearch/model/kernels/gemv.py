"""Projections of one token: norm, matrix-vector product and epilogue in one kernel; and the LM head.

At batch 1 a projection is bound by reading its weights, so each program holds a few rows, asks for all of
them before it waits for the kernel that makes its input, and normalises the input itself. What comes after that wait
no other work hides: one look at memory (input and residual together), and the product on tensor cores.
``gemm.py`` is for larger batches.
"""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from archsearch.model.kernels.common import power_of_two, power_of_two_in, silu, wait
from archsearch.model.kernels.products import load_pair, load_vector, multiply_pair

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
    while rows > 2 - gated and k * rows * (1 + gated) > THREAD_WEIGHTS * 32 * warps:
        rows //= 2
    chunk = min(chunk, power_of_two(k))
    if group not in (None, k) and (group > chunk or group & (group - 1)):
        chunk = min(chunk, power_of_two_in(group))
    return Cut(rows, steps, chunk, warps)


@triton.jit
def load_steps(x, rows, N, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """What is added to the rows of each step, as a tuple of [ROWS] in fp32."""
    tiles = ()
    for step in tl.static_range(STEPS):
        later = rows + step * ROWS
        tiles = tiles + (tl.load(x + later, mask=later < N, other=0.0).to(tl.float32),)
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
def gemv_kernel(x, gain, squares, weight, bias, out, best, best_row, N, eps,
                K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
                PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, GAIN: tl.constexpr, SQUARES: tl.constexpr,
                BIAS: tl.constexpr, EPILOGUE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows ``ROWS * STEPS * program`` onwards of ``epilogue(weight @ norm(x) + bias)``."""
    start = tl.program_id(0) * (ROWS * STEPS)
    rows = start + tl.arange(0, ROWS)
    HALF: tl.constexpr = ROWS if EPILOGUE == GATED else ROWS // 2
    first, second = load_pair(weight, start, N, K, HALF, CHUNK, EPILOGUE == GATED)
    if GAIN:
        gains = load_vector(gain, K, CHUNK)
    if BIAS:
        added = load_steps(bias, rows, N, ROWS, STEPS)
    wait(PDL)
    vector = load_vector(x, K, CHUNK)
    if EPILOGUE == RESIDUAL:
        added = load_steps(out, rows, N, ROWS, STEPS)
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
            after = start + (step + 1) * ROWS
            next_first, next_second = load_pair(weight, after, N, K, HALF, CHUNK, EPILOGUE == GATED)
        y, other = multiply_pair(first, second, vector, HALF, CHUNK, PDL)
        y, other = y * scale, other * scale
        y = silu(y) * other if EPILOGUE == GATED else tl.reshape(tl.join(y, other), [ROWS])
        if BIAS or EPILOGUE == RESIDUAL:
            y += added[step]
        if EPILOGUE == LOGITS:
            # the largest of the logits as stored, so that equals are equal
            y = y.to(out.dtype.element_ty).to(tl.float32)
            better = inside & (y > highest)
            highest = tl.where(better, y, highest)
            highest_row = tl.where(better, rows, highest_row)
        tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)
        rows += ROWS
        if step + 1 < STEPS:
            first, second = next_first, next_second
    if EPILOGUE == LOGITS:
        top = tl.max(highest, 0)
        tl.store(best + tl.program_id(0), top)
        tl.store(best_row + tl.program_id(0), tl.min(tl.where(highest == top, highest_row, N), 0))
