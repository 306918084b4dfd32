"""The delta rule by flash-linear-attention's kernels, without computing anything twice.

The library's own function saves memory and computes the chunks' states and their WY representation
(arXiv 2406.06484) again in the backward pass. Here they are kept: three to four tensors of the size of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch.model.fla_library import operator

CHUNK = 64
WY = "fla.ops.delta_rule.wy_fast"
STATES = "fla.ops.common.chunk_delta_h"
OUTPUTS = "fla.ops.common.chunk_o"


class DeltaRule(torch.autograd.Function):
    """Outputs [B, T, H, V], and where asked for the state after the last token [B, H, K, V] in fp32, through which
    no gradient passes; of ``q`` and ``k`` [B, T, H, K], normalised, ``v`` [B, T, H, V] and ``beta`` [B, T, H].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v, beta = (t.contiguous() for t in (q, k, v, beta))
        w, u, inverse = operator(f"{WY}:prepare_wy_repr_fwd")(k=k, v=v, beta=beta, cu_seqlens=None, chunk_size=CHUNK)
        states, new, final = operator(f"{STATES}:chunk_gated_delta_rule_fwd_h")(
            k=k, w=w, u=u, output_final_state=keep, chunk_size=CHUNK
        )
        scale = k.shape[-1] ** -0.5
        o = operator(f"{OUTPUTS}:chunk_fwd_o")(q=q, k=k, v=new, h=states, scale=scale, chunk_size=CHUNK)
        ctx.save_for_backward(q, k, v, beta, inverse, w, new, states)
        if final is not None:
            ctx.mark_non_differentiable(final)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, beta, inverse, w, new, states = ctx.saved_tensors
        do, scale = do.contiguous(), k.shape[-1] ** -0.5
        inner = operator(f"{OUTPUTS}:chunk_bwd_dv_local")(q=q, k=k, do=do, scale=scale, chunk_size=CHUNK)
        d_states, _, d_new = operator(f"{STATES}:chunk_gated_delta_rule_bwd_dhu")(
            q=q, k=k, w=w, h0=None, dht=None, do=do, dv=inner, scale=scale, chunk_size=CHUNK
        )
        dq, dk, dw, _ = operator(f"{OUTPUTS}:chunk_bwd_dqkwg")(
            q=q, k=k, v=new, w=w, h=states, dv=d_new, do=do, dh=d_states, scale=scale, chunk_size=CHUNK
        )
        through_w, dv, d_beta = operator(f"{WY}:prepare_wy_repr_bwd")(
            k=k, v=v, beta=beta, A=inverse, dw=dw, du=d_new, cu_seqlens=None
        )
        return dq, dk.add_(through_w), dv, d_beta.to(beta.dtype), None
