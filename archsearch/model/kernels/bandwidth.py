"""A kernel that only reads: how fast memory can be for kernels like ours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archsearch.model.kernels.common import launch

BLOCK, STEPS = 4096, 4


@triton.jit
def read_kernel(x, out, BLOCK: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr):
    """Sum ``BLOCK * STEPS`` numbers a program."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(STEPS):
        total += tl.load(x + start + i * BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_sums(x: Tensor, out: Tensor) -> None:
    """Read all of ``x`` (int32, a multiple of 16384 numbers) and leave a sum of every 16384 in ``out``."""
    launch(read_kernel, (x.numel() // (BLOCK * STEPS),), x, x, out, BLOCK=BLOCK, STEPS=STEPS, warps=8)


def read_sums_reference(x: Tensor, out: Tensor) -> None:
    """``read_sums`` in plain torch."""
    out.copy_(x.view(-1, BLOCK * STEPS).sum(1, dtype=torch.int64).to(torch.int32))
