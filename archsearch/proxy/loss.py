"""Cross-entropy behind the head, without ever holding all logits of a large vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from archsearch.model.hybrid import HybridLM

MAX_LOGITS = 2**25
"""Logits in memory at once: 128 MiB of them in fp32, and as much again for their gradient."""


def token_loss(model: HybridLM, hidden: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """Mean cross-entropy in fp32, nats a token.

    On a GPU in half precision the head and the loss are one (``cross_entropy.py``). Elsewhere, where all logits
    would be more than ``max_logits``, the head runs over pieces of the batch, and runs again in the backward
    pass instead of keeping each piece's logits.

    Args:
        model: whose head to apply.
        hidden: [B, T, hidden], what ``model.hidden`` returned.
        targets: [B, T], the tokens that follow.
        max_logits: numbers.
    """
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if torch.is_autocast_enabled("cuda") and hidden.is_cuda:
        return _fused(model, rows, wanted)
    return checkpointed_loss(model, rows, wanted, max_logits)


def checkpointed_loss(model: HybridLM, rows: Tensor, wanted: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """``token_loss`` in plain torch; ``rows`` [N, hidden], ``wanted`` [N]."""
    if len(wanted) * model.architecture.vocab_size <= max_logits:
        return _total(model, rows, wanted) / len(wanted)
    size = max(max_logits // model.architecture.vocab_size, 1)
    pieces = zip(rows.split(size), wanted.split(size), strict=True)
    totals = [checkpoint(_total, model, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    loss: Tensor = sum(totals[1:], totals[0]) / len(wanted)
    return loss


def loss_path(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation ``token_loss`` takes: ``fused`` or ``torch``."""
    return "fused" if device.type == "cuda" and dtype is not torch.float32 else "torch"


def _fused(model: HybridLM, rows: Tensor, wanted: Tensor) -> Tensor:
    from archsearch.proxy.cross_entropy import LinearCrossEntropy

    half = rows.to(torch.get_autocast_dtype("cuda"))
    with torch.autocast("cuda", enabled=False):
        loss: Tensor = LinearCrossEntropy.apply(half, model.head_weight, wanted, torch.is_grad_enabled())
    return loss


def _total(model: HybridLM, rows: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(rows).float(), wanted, reduction="sum")
