"""Triton kernels of the training step; each has a twin in plain torch where it is used.

Configurations are fixed, so that nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.fused.fast_math import fast_exp2

# Triton's custom: compile-time constants are capitals.
# ruff: noqa: N803

# Cross-entropy

MAX_BLOCK = 8192


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softmax_gradient(logits, targets, losses, scale, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """The loss of one row of ``logits`` [N, V]; with GRADIENT, ``scale`` times its gradient replaces the row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    target = base + tl.load(targets + row)
    # read before the sums below, whose barriers keep every write behind this
    wanted = tl.load(target).to(tl.float32)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(base + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, 0))
        total = total * fast_exp2((highest - above) * LOG2E) + tl.sum(fast_exp2(x * LOG2E - above * LOG2E), 0)
        highest = above
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - wanted)
    if GRADIENT:
        shift = log_sum * LOG2E - tl.log2(scale)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(base + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            tl.store(base + columns, fast_exp2(x * LOG2E - shift).to(logits.dtype.element_ty), mask=columns < V)
        tl.debug_barrier()  # the target's own gradient takes the place of what was just written there
        tl.store(target, (fast_exp2(wanted * LOG2E - shift) - scale).to(logits.dtype.element_ty))


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    """Cross-entropy of each row, fp32 [N].

    Args:
        logits: [N, V], contiguous; with ``gradient`` replaced by ``scale`` times its own gradient.
        targets: [N].
        scale: of the gradient.
        gradient: whether to write it.
    """
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    size = logits.shape[1]
    block = min(triton.next_power_of_2(size), MAX_BLOCK)
    options = {"num_warps": 4 if block <= 2048 else 8}
    _softmax_gradient[(len(logits),)](logits, targets, losses, scale, V=size, GRADIENT=gradient, BLOCK=block, **options)
    return losses


# Weight normalization: every program looks up in a table which rows or columns of which matrix are its own

ROWS = 4
"""Rows that a program normalises."""

COLUMNS = 32
"""Columns that a program normalises: one memory transaction of fp32."""

TINY = tl.constexpr(1e-24)
"""Least squared norm to divide by, so that a vector of zeros stays one."""


def row_table(matrices: Sequence[Tensor]) -> Tensor:
    """(address, rows left) of every ``ROWS`` rows of fp32 matrices of equal width, int64 on their device."""
    entries = []
    for matrix in matrices:
        size, width = matrix.shape
        entries += [(matrix.data_ptr() + 4 * width * row, size - row) for row in range(0, size, ROWS)]
    return torch.tensor(entries, device=matrices[0].device)


def column_table(matrices: Sequence[Tensor]) -> Tensor:
    """(address, columns left, columns in all) of every ``COLUMNS`` columns of fp32 matrices of equal height."""
    entries = []
    for matrix in matrices:
        width = matrix.shape[1]
        entries += [(matrix.data_ptr() + 4 * column, width - column, width) for column in range(0, width, COLUMNS)]
    return torch.tensor(entries, device=matrices[0].device)


def normalize_rows_(table: Tensor, width: int) -> None:
    """Divide each row, of ``width`` numbers, by its 2-norm."""
    _normalize_rows[(len(table),)](table, width, ROWS=ROWS, BLOCK=triton.next_power_of_2(width))


def normalize_columns_(table: Tensor, height: int) -> None:
    """Divide each column, of ``height`` numbers, by its 2-norm."""
    _normalize_columns[(len(table),)](table, height, COLUMNS=COLUMNS, BLOCK=64)


@triton.jit
def _normalize_rows(table, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    entry = table + 2 * tl.program_id(0)
    start = tl.load(entry).to(tl.pointer_type(tl.float32))
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (rows < tl.load(entry + 1)) & (columns < H)
    address = start + rows * H + columns
    x = tl.load(address, mask=inside, other=0.0)
    tl.store(address, x / tl.sqrt(tl.maximum(tl.sum(x * x, 1), TINY))[:, None], mask=inside)


@triton.jit
def _normalize_columns(table, H, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    entry = table + 3 * tl.program_id(0)
    start = tl.load(entry).to(tl.pointer_type(tl.float32))
    left, width = tl.load(entry + 1), tl.load(entry + 2)
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, H, BLOCK):
        inside = (first + rows < H) & (columns < left)
        x = tl.load(start + (first + rows) * width + columns, mask=inside, other=0.0)
        squares += tl.sum(x * x, 0)
    scale = (1 / tl.sqrt(tl.maximum(squares, TINY)))[None, :]
    for first in range(0, H, BLOCK):
        inside = (first + rows < H) & (columns < left)
        address = start + (first + rows) * width + columns
        tl.store(address, tl.load(address, mask=inside, other=0.0) * scale, mask=inside)
