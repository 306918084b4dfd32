"""The delta rule with the norm of its outputs, without computing anything twice.

The memory is carried over the chunks by flash-linear-attention's kernels; before and behind them, where the library
has a kernel for every step, there is one each way: ``wy``, ``read_out``, ``chunk_gradient``. The library's own
function saves memory and computes the memories and the WY representation again in the backward pass. Here they are
kept: four to five tensors of the size of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch.model.fla_library import operator
from archsearch.model.fused.chunk_gradient import chunk_gradient
from archsearch.model.fused.chunks import CHUNK
from archsearch.model.fused.read_out import read_out, read_out_gradient
from archsearch.model.fused.wy import wy

CARRY = "fla.ops.common.chunk_delta_h"


class DeltaRule(torch.autograd.Function):
    """Normed outputs [B, T, H, V], and where asked for the state after the last token [B, H, K, V] in fp32, through
    which no gradient passes; of ``q`` and ``k`` [B, T, H, K], normalised, ``v`` [B, T, H, V], the rates before their
    sigmoid in the first H columns of ``logits`` [B, T, ...], and ``gain`` [V] of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, gain: Tensor, eps: float, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (t.contiguous() for t in (q, k, v))
        if logits.stride(-1) != 1 or logits.stride(0) != logits.shape[1] * logits.stride(1):
            logits = logits.contiguous()
        w, u, inverse = wy(k, v, logits)
        states, new, final = operator(f"{CARRY}:chunk_gated_delta_rule_fwd_h")(
            k=k, w=w, u=u, output_final_state=keep, chunk_size=CHUNK
        )
        o, normed = read_out(q, k, new, states, gain, k.shape[-1] ** -0.5, eps)
        ctx.save_for_backward(q, k, v, logits, gain, inverse, w, new, states, o)
        ctx.eps = eps
        if final is not None:
            ctx.mark_non_differentiable(final)
        return normed, final

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, logits, gain, inverse, w, new, states, o = ctx.saved_tensors
        scale = k.shape[-1] ** -0.5
        do, inner, d_gain = read_out_gradient(q, k, o, gain, grad.contiguous(), scale, ctx.eps)
        d_states, _, d_new = operator(f"{CARRY}:chunk_gated_delta_rule_bwd_dhu")(
            q=q, k=k, w=w, h0=None, dht=None, do=do, dv=inner, scale=scale, chunk_size=CHUNK
        )
        gradients = chunk_gradient(q, k, v, logits, inverse, new, states, do, d_new, d_states, scale)
        return *gradients, d_gain, None, None
