"""Linear layer and cross-entropy in one, for GPUs: loss and gradients a piece of the batch at a time.

The gradient of the logits takes the place of the logits as soon as the loss has been read off them, so that
nothing of the size [tokens, vocabulary] outlives its piece and nothing is computed twice (the idea of
Liger-Kernel, arXiv 2410.10989). Products run in bf16 and sum in fp32; the loss is fp32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LOGITS = 2**26
"""Logits in memory at once: 128 MiB in bf16."""

MAX_BLOCK = 8192


@triton.jit
def _softmax_gradient(logits, targets, losses, scale, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """The loss of one row of ``logits`` [N, V]; with GRADIENT, ``scale`` times its gradient replaces the row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    target = tl.load(targets + row)
    # read before the sums below, whose barriers keep every write behind this
    wanted = tl.load(base + target).to(tl.float32)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(base + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), 0)
        highest = above
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - wanted)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(base + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            gradient = scale * (tl.exp(x - log_sum) - tl.where(columns == target, 1.0, 0.0))
            tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=columns < V)


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
    _softmax_gradient[(len(logits),)](logits, targets, losses, scale, size, GRADIENT=gradient, BLOCK=block, **options)
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``; the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool, max_logits: int = MAX_LOGITS
    ) -> Tensor:
        """The loss, fp32 []; ``hidden`` [N, H] in half precision, ``weight`` [V, H], ``targets`` [N]."""
        half = weight.to(hidden.dtype)
        size = max(max_logits // len(half), 1)
        to_hidden = torch.empty_like(hidden) if gradient else None
        to_weight, losses = None, []
        for first in range(0, len(hidden), size):
            rows = hidden[first : first + size]
            logits = rows @ half.T
            losses.append(softmax_gradient_(logits, targets[first : first + size], 1 / len(hidden), gradient))
            if to_hidden is not None:
                torch.mm(logits, half, out=to_hidden[first : first + size])
                to_weight = _add_product(to_weight, logits.T, rows)
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.weight_dtype = weight.dtype
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times the one that comes in."""
        to_hidden, to_weight = ctx.saved_tensors
        (scale,) = upstream
        return to_hidden * scale.to(to_hidden.dtype), (to_weight * scale).to(ctx.weight_dtype), None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b`` in fp32; the product of half-precision matrices is summed in fp32."""
    if not a.is_cuda:
        product = a.float() @ b.float()
        return product if total is None else total + product
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32)
