"""Log decays of gated linear attention, ``logsigmoid(x) / normalizer``: 16 bits in, fp32 out, one pass each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


def log_decay_reference(x: Tensor, normalizer: float) -> Tensor:
    """``logsigmoid(x) / normalizer`` in fp32."""
    return F.logsigmoid(x.float()) / normalizer


def log_decay(x: Tensor, normalizer: float) -> Tensor:
    """``log_decay_reference`` by a kernel."""
    return _LogDecay.apply(x, normalizer)


class _LogDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, normalizer: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x, dtype=torch.float32)
        ctx.save_for_backward(x)
        ctx.normalizer = normalizer
        _log_decay_forward[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), 1 / normalizer, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(x)
        _log_decay_backward[(triton.cdiv(x.numel(), BLOCK),)](x, grad, out, x.numel(), 1 / ctx.normalizer, BLOCK=BLOCK)
        return out, None


@triton.jit(do_not_specialize=["scale"])
def _log_decay_forward(x, out, number, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < number, other=0.0).to(tl.float32)
    # minus softplus(-x), in the form that overflows on neither side
    tl.store(out + at, scale * (tl.minimum(value, 0.0) - tl.log(1 + tl.exp(-tl.abs(value)))), mask=at < number)


@triton.jit(do_not_specialize=["scale"])
def _log_decay_backward(x, grad, out, number, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < number, other=0.0).to(tl.float32)
    slope = tl.load(grad + at, mask=at < number, other=0.0).to(tl.float32) * scale * tl.sigmoid(-value)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=at < number)
