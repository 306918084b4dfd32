"""Softmax attention with grouped keys and values (GQA), over everything before or over a window."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import RMSNorm, linear, rotate

MIN_BLOCK = 64
"""Queries are cut into blocks of the window, but not below this: tiny products waste time."""


class Attention(Layer):
    """Causal softmax attention: RoPE, grouped KV heads, optional RMSNorm of queries and keys before RoPE.

    State: ``k`` and ``v`` [B, kv_heads, slots, head_dim]; keys are stored rotated.
    """

    residual: ClassVar[str] = "o_proj"
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "SDPA flash"

    def __init__(self, config: operators.Attention, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.visible = config.visible
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        self.heads, self.kv_heads = config.query_heads(hidden_size), config.stored_heads(hidden_size)
        self.q_proj = linear(hidden_size, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = linear(hidden_size, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = linear(hidden_size, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = linear(self.heads * self.head_dim, hidden_size)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if config.qk_norm else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over whole sequences, [B, heads, T, D]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def unsupported(self) -> tuple[str, str] | None:
        if self.head_dim % 8:
            return f"head_dim {self.head_dim} is no multiple of 8", "flash kernels take 8, 16, 24, ... 256"
        return None

    def mix_fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``mix`` through a flash kernel, on [B, T, heads, D]."""
        return fla_ops.attention(q, k, v)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.kv_heads, self.visible(length), self.head_dim
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = self._qkv(x, positions)
        if state is not None:
            self._store(state, k, v, positions)
        return self._output(self.mix(q, k, v))

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.heads import rotary_table, split_heads

        x = fla_ops.half(x)
        table = rotary_table(x.shape[1], self.head_dim, self.theta, x.device)
        gains = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        projected = fla_ops.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = split_heads(projected, table, *gains, self.heads, self.kv_heads, eps)
        if state is not None:
            self._store(state, k.transpose(1, 2), v.transpose(1, 2), torch.arange(x.shape[1], device=x.device))
        return fla_ops.project(self.mix_fused(q, k, v).flatten(-2), self.o_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        q, k, v = self._qkv(x[:, None], position[None])
        self._store(state, k, v, position[None])
        written = (torch.arange(state["k"].shape[2], device=x.device) <= position)[None]
        keys, values = (state[name].to(q.dtype) for name in ("k", "v"))
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=written, enable_gqa=True)
        return self._output(o)[:, 0]

    def slot(self, position: Tensor, slots: int) -> Tensor:
        """Where the token at ``position`` is stored; past the end the last slot, never outside memory."""
        return position.clamp(max=slots - 1)

    def _store(self, state: State, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write the keys and values of ``positions``, of which only the last fit into a ring."""
        slots = state["k"].shape[2]
        slot = self.slot(positions[-slots:], slots)
        for name, new in (("k", k), ("v", v)):
            state[name].index_copy_(2, slot, new[:, :, -slots:].to(state[name].dtype))

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, D], normed and rotated."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return rotate(q, positions, self.theta), rotate(k, positions, self.theta), v

    def _output(self, o: Tensor) -> Tensor:
        return self.o_proj(o.transpose(1, 2).flatten(-2))


class SlidingWindowAttention(Attention):
    """Causal softmax attention over the last ``window`` tokens, the current one included.

    The state is a ring: position p is in slot p mod slots.
    """

    kernels: ClassVar[str] = "flash attention, windowed"

    def __init__(self, config: operators.SlidingWindowAttention, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, norm_eps)
        self.window = config.window

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] <= self.window:
            return super().mix(q, k, v)
        return windowed_attention(q, k, v, self.window)

    def mix_fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] <= self.window:
            return super().mix_fused(q, k, v)
        return fla_ops.windowed_attention(q, k, v, self.window)

    def slot(self, position: Tensor, slots: int) -> Tensor:
        return position % slots


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each query to the last ``window`` keys, in blocks: cost and memory grow as T, not T².

    A block of queries reads its own block of keys and the one before. The first block has none before,
    and the others share one mask, so no mask grows with T or B.

    Args:
        q: [B, heads, T, D].
        k: [B, kv_heads, T, D].
        v: [B, kv_heads, T, D].
        window: keys that a query sees, its own included.
    """
    batch, _, length, _ = q.shape
    block = max(window, MIN_BLOCK)
    q, k, v = (F.pad(t, (0, 0, 0, -length % block)).unflatten(2, (-1, block)) for t in (q, k, v))
    ahead = torch.arange(block, 2 * block, device=q.device)[:, None] - torch.arange(2 * block, device=q.device)
    seen = (ahead >= 0) & (ahead < window)
    first = F.scaled_dot_product_attention(
        q[:, :, 0], k[:, :, 0], v[:, :, 0], attn_mask=seen[:, block:], enable_gqa=True
    )
    if q.shape[2] == 1:
        return first[:, :, :length]
    k, v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], dim=3) for t in (k, v))
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q[:, :, 1:], k, v))
    rest = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]
