"""The recurrences through flash-linear-attention's Triton kernels, and attention through flash kernels.

Same results as the functions of ``recurrence.py`` and of the layers, which are the truth that these are
tested against. The library's functions are called directly: its layer classes swallow unknown options.
Everything here computes in bf16 or fp16 (``half``), with states and decays in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import ConfigError
from archsearch.model.fla_library import operator
from archsearch.model.requirements import installed

ALIGNED = 16
"""Columns that keep the rows of a 16-bit product aligned for matrix units."""

SCAN_CHUNK = 256
"""Tokens a chunk of mamba-ssm's scan: its own default."""


def half(x: Tensor) -> Tensor:
    """``x`` in the type of ``half_dtype``."""
    return x.to(half_dtype(x))


def half_dtype(x: Tensor) -> torch.dtype:
    """The 16-bit type that kernels compute in: autocast's, or that of ``x``.

    Raises:
        ConfigError: ``x`` is fp32 and autocast is off.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"the GPU kernels compute in bfloat16, not {dtype}", "set proxy.dtype=bfloat16")
    return dtype


def project(x: Tensor, *layers: nn.Linear, multiple: int = 1) -> Tensor:
    """The outputs of one or several projections of ``x`` (what ``half`` gives) side by side, by one matrix product.

    Columns of zeros fill them up to a ``multiple``; layers with biases take none.
    """
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).to(x.dtype) if biases else None
    return _Project.apply(x, bias, multiple, *(layer.weight for layer in layers))


def project_apart(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of several projections without bias as views of one product, for those that few columns have."""
    sizes = [layer.out_features for layer in layers]
    found = project(x, *layers, multiple=ALIGNED)
    return found.split([*sizes, found.shape[-1] - sum(sizes)], dim=-1)[:-1]


class _Project(torch.autograd.Function):
    """``x`` times weights that are cast and joined in one pass, filled up with rows of zeros to a multiple.

    The gradient of the weights is given as the product summed it, not rounded to 16 bits and cast back: that is more
    exact, and a pass less for each of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, multiple: int, *weights: Tensor) -> Tensor:
        ctx.sizes, ctx.dtype = [len(weight) for weight in weights], weights[0].dtype
        rows = sum(ctx.sizes)
        merged = weights[0].new_empty(rows + -rows % multiple, weights[0].shape[1], dtype=x.dtype)
        torch._foreach_copy_(merged[:rows].split(ctx.sizes), weights)
        if rows < len(merged):
            merged[rows:].zero_()
        ctx.save_for_backward(x, merged)
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged = ctx.saved_tensors
        dx = grad @ merged if ctx.needs_input_grad[0] else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        d_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        exact = grad.is_cuda and ctx.dtype is torch.float32 and grad.dtype is not torch.float32
        d_weight = torch.mm(grad.T, x, out_dtype=ctx.dtype) if exact else (grad.T @ x).to(ctx.dtype)
        return dx, d_bias, None, *d_weight[: sum(ctx.sizes)].split(ctx.sizes)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, gain: Tensor, eps: float, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with normalised ``q`` and ``k``, then the RMSNorm of each head; a state if ``keep``.

    Shapes are those of ``delta_rule_chunked``; the rates are as projected, before their sigmoid, in the first columns
    of ``logits`` [B, T, ...].
    """
    from archsearch.model.fused.chunks import fits
    from archsearch.model.fused.delta_rule import DeltaRule
    from archsearch.model.fused.norm import norm

    if fits(k, v):
        o, state = DeltaRule.apply(q, k, v, logits, gain, eps, keep)
    else:
        chunk = operator("fla.ops.delta_rule.chunk:chunk_delta_rule")
        o, state = chunk(q, k, v, logits[..., : q.shape[2]].sigmoid(), output_final_state=keep)
        o = norm(o, gain, eps)
    return o, state.mT if keep else None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, a_log: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule with normalised ``q`` and ``k``, and gates as projected: [B, T, H] before
    sigmoid (``beta``) and before softplus (``decay``).
    """
    chunk = operator("fla.ops.gated_delta_rule.chunk:chunk_gated_delta_rule")
    return chunk(
        q, k, v, decay, beta, output_final_state=keep, state_v_first=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, A_log=a_log, dt_bias=dt_bias,
    )  # fmt: skip


def gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention; shapes as in ``gla_chunked``."""
    chunk = operator("fla.ops.gla.chunk:chunk_gla")
    return chunk(q, k, v, decay.float(), output_final_state=keep, state_v_first=True)


def kda(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, a_log: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention with normalised ``q`` and ``k``, and gates as projected: ``beta`` [B, T, H] before
    sigmoid, ``decay`` [B, T, H, K] before softplus.
    """
    chunk = operator("fla.ops.kda.chunk:chunk_kda")
    return chunk(
        q, k, v, decay, beta, output_final_state=keep, state_v_first=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, A_log=a_log, dt_bias=dt_bias,
    )  # fmt: skip


def rwkv7(
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, strongest: float, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7's recurrence, its log decays at least ``strongest``; shapes as in ``dplr_chunked``."""
    chunk = operator("fla.ops.rwkv7.chunk:chunk_rwkv7")
    # with decays this weak a chunk of 64 stays in the range of the matrix units
    o, state = chunk(
        r, decay, k, v, a, b, scale=1.0, output_final_state=keep, safe_gate=True, lower_bound=strongest, chunk_size=64
    )
    return o, state.mT if keep else None


def ssd(
    c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's state-space model with its skip ``D x``; a state if ``keep``.

    Args:
        c: [B, T, groups, state], reads the state.
        b: [B, T, groups, state], writes to it.
        x: [B, T, heads, head_dim].
        dt: [B, T, heads] before bias and softplus.
        rate: [heads], A (negative), fp32.
        skip: [heads], D.
        dt_bias: [heads].
        keep: whether to return the state after the last token.
    """
    return (ssd_scan if installed("mamba_ssm") else ssd_linear)(c, b, x, dt, rate, skip, dt_bias, keep=keep)


def ssd_scan(
    c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``ssd`` through mamba-ssm's Triton scan, in which the heads of a group share ``b`` and ``c``."""
    scan = operator("mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined")
    found = scan(
        x, dt, rate, b, c, SCAN_CHUNK, D=skip, dt_bias=dt_bias, dt_softplus=True, return_final_states=keep
    )  # fmt: skip
    return found if keep else (found, None)


def ssd_linear(
    c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``ssd`` as linear attention with one decay a head (fla's simple GLA); ``b`` and ``c`` are repeated."""
    chunk = operator("fla.ops.simple_gla.chunk:chunk_simple_gla")
    repeats = x.shape[2] // b.shape[2]
    c, b = (t.repeat_interleave(repeats, dim=2) for t in (c, b))
    step = F.softplus(dt.float() + dt_bias.float())
    scaled = x * step[..., None].to(x.dtype)
    o, state = chunk(c, b, scaled, step * rate, scale=1.0, output_final_state=keep, state_v_first=True)
    return o + skip.to(o.dtype)[:, None] * x, state


def selective_scan(
    c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, skip: Tensor, z: Tensor, dt_bias: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Mamba's state-space model with its skip ``D x`` and its gate ``z``; a state, without a gradient, if ``keep``.

    Args:
        c: [B, T, state], reads the state.
        b: [B, T, state], writes to it.
        x: [B, T, inner].
        dt: [B, T, inner] before bias and softplus.
        rate: [inner, state], A (negative), fp32.
        skip: [inner], D, fp32.
        z: [B, T, inner].
        dt_bias: [inner], fp32.
        keep: whether to return the state after the last token.
    """
    scan = operator("mamba_ssm.ops.selective_scan_interface:selective_scan_fn")
    x, dt, b, c, z = (t.mT.contiguous() for t in (x, dt, b, c, z))
    found = scan(x, dt, rate, b, c, skip, z, dt_bias, delta_softplus=True, return_last_state=keep)
    o, state = found if keep else (found, None)
    return o.mT, state


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention through a flash kernel, [B, T, heads, D]; never through a dense matrix of scores."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each query [B, T, heads, D] to the last ``window`` keys, through torch's flash kernel.

    The kernel skips the blocks outside the window: time grows as T times window. It is called by its own name:
    ``scaled_dot_product_attention`` knows no window, and ``varlen_attn``, which does, costs the host a millisecond.
    """
    length = q.shape[1]
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False, window_size_left=window - 1, window_size_right=0
    )  # sequences of one length, no dropout, causal, no debug mask
    return found[0]
