"""Linear layer and cross-entropy in one, for GPUs: loss and gradients a piece of the batch at a time.

The gradient of the logits takes the place of the logits as soon as the loss has been read off them, so that
nothing of the size [tokens, vocabulary] outlives its piece and nothing is computed twice (the idea of
Liger-Kernel, arXiv 2410.10989). Products run in bf16 and sum in fp32; the loss is fp32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch.proxy.kernels import softmax_gradient_

MAX_LOGITS = 2**26
"""Logits in memory at once: 128 MiB in bf16."""


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
    """``total + a @ b`` in fp32, on a GPU in place; the product of half-precision matrices is summed in fp32."""
    if not a.is_cuda:
        product = a.float() @ b.float()
        return product if total is None else total + product
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
