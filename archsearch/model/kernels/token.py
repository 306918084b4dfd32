"""The end of a step: the next token from the parts that ``head`` reports, its embedding, the next position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.kernels.common import launch, power_of_two


@triton.jit
def select_kernel(best, best_row, embedding, token, hidden, position,
                  PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One program a sequence."""
    sequence = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    column = tl.arange(0, HIDDEN_BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(best + sequence * PARTS + part, mask=part < PARTS, other=float("-inf"))
    row = tl.load(best_row + sequence * PARTS + part, mask=part < PARTS, other=2147483647)
    chosen = tl.min(tl.where(value == tl.max(value, 0), row, 2147483647), 0).to(tl.int64)
    # logits that are all NaN choose nothing; the clamp keeps the look-up inside the table
    chosen = tl.where(chosen == 2147483647, 0, chosen)
    tl.store(token + sequence, chosen)
    row_of = tl.load(embedding + chosen * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(hidden + sequence * HIDDEN + column, row_of, mask=column < HIDDEN)
    if sequence == 0:
        # an atomic with release: the next step may read the position before it waits for this kernel
        tl.atomic_add(position, 1, sem="acq_rel")
    if PDL:
        tl.debug_barrier()
        tl.extra.cuda.gdc_launch_dependents()


def select(best: Tensor, best_row: Tensor, embedding: Tensor, token: Tensor, hidden: Tensor, position: Tensor) -> None:
    """Choose the most likely token (the first of equals), look it up, move on.

    Args:
        best: [B, parts], largest logits that ``head`` wrote.
        best_row: [B, parts], where they are.
        embedding: [V, H].
        token: [B] in int64, written.
        hidden: [B, H], written.
        position: [] in int64, incremented.
    """
    (batch, parts), width = best.shape, hidden.shape[1]
    sizes = {"PARTS": parts, "PARTS_BLOCK": power_of_two(parts), "HIDDEN": width, "HIDDEN_BLOCK": power_of_two(width)}
    launch(select_kernel, (batch,), best, best, best_row, embedding, token, hidden, position,
           **sizes, warps=8)  # fmt: skip


def select_reference(
    best: Tensor,
    best_row: Tensor,
    embedding: Tensor,
    token: Tensor,
    hidden: Tensor,
    position: Tensor,
) -> None:
    """``select`` in plain torch."""
    largest = best == best.amax(-1, keepdim=True)
    token.copy_(best_row.long().masked_fill(~largest, torch.iinfo(torch.int64).max).amin(-1))
    hidden.copy_(embedding[token])
    position.add_(1)
