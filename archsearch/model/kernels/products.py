"""Rows of a matrix times a vector: how they are loaded, and the product.

Once a program has its input, only the product stands between it and the end of the kernel, which all later ones wait
for. On ordinary units that takes five instructions for two weights in bf16, on tensor cores one for eight. Their
result is a matrix of which a vector needs the diagonal alone, so that no thread has to exchange a weight.
"""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


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
def multiply(tiles, vector, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows times vector, [ROWS] in fp32."""
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(len(tiles)):
        total += tiles[i].to(tl.float32) * vector[i]
    return tl.sum(total, 1)


@triton.jit
def load_pair(weight, start, N, K: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, GATED: tl.constexpr):
    """Two halves of HALF rows from ``start``: of the gate and of what it gates, N rows apart, or even and odd rows."""
    if GATED:
        rows = start + tl.arange(0, HALF)
        first = load_rows(weight, rows, N, K, CHUNK)
        second = load_rows(weight + N.to(tl.int64) * K, rows, N, K, CHUNK)
    else:
        rows = start + 2 * tl.arange(0, HALF)
        first = load_rows(weight, rows, N, K, CHUNK)
        second = load_rows(weight, rows + 1, N, K, CHUNK)
    return first, second


MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
"""D = A B + C on tensor cores, A [16, 16], B [16, 8], for four columns a thread of two halves and of a vector.

Lanes 4 g to 4 g + 3 hold row g of A, here their columns of the first half, row g + 8, here those of the second, and
column g of B, here those of the vector. So D[g, g] and D[g + 8, g] are what these four lanes' columns add to the two
products. The rest of D mixes columns of one lane with those of another, and is dropped.
"""
DIAGONAL = tl.constexpr("""{
    .reg .pred even, odd;
    .reg .u32 lane, group, column;
    mov.u32 lane, %laneid;
    shr.u32 group, lane, 2;
    and.b32 column, lane, 3;
    shl.b32 column, column, 1;
    setp.eq.u32 even, group, column;
    add.u32 column, column, 1;
    setp.eq.u32 odd, group, column;
    selp.f32 $0, $4, 0f00000000, even;
    selp.f32 $1, $5, 0f00000000, odd;
    selp.f32 $2, $6, 0f00000000, even;
    selp.f32 $3, $7, 0f00000000, odd;
}""")
"""Lane 4 g + c holds columns 2 c and 2 c + 1 of rows g and g + 8 of D: what of them is not dropped, else 0."""


@triton.jit
def multiply_pair(first, second, vector, HALF: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Two halves of rows times vector, each [HALF] in fp32; in bf16 on a GPU on tensor cores, the vector rounded.

    Four neighbouring lanes must hold columns of the same row, as they do where a row is a load of each lane of a warp.
    """
    if PDL and CHUNK >= 256 and first[0].dtype == tl.bfloat16:
        total = tl.zeros([HALF, CHUNK], tl.float32)
        for i in tl.static_range(len(first)):
            x = tl.broadcast_to(vector[i].to(tl.bfloat16), [HALF, CHUNK])
            operands = [first[i], second[i], x, total]
            total = tl.inline_asm_elementwise(
                MULTIPLY, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", operands, tl.float32, is_pure=True, pack=4
            )
        total = tl.inline_asm_elementwise(DIAGONAL, "=f,=f,=f,=f,f,f,f,f", [total], tl.float32, is_pure=True, pack=4)
        return tl.split(tl.sum(tl.sum(tl.reshape(total, [HALF, CHUNK // 4, 2, 2]), 3), 1))
    else:
        return multiply(first, vector, HALF, CHUNK), multiply(second, vector, HALF, CHUNK)
