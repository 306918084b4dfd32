"""Gated linear attention (GLA): linear attention with a decay a key channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import gla_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import RMSNorm, linear
from archsearch.model.recurrence import Mixed, accumulator, gla_step


class GLA(Layer):
    """GLA (arXiv 2312.06635) with output gate, its weights named as in flash-linear-attention.

    State: ``recurrent`` [B, heads, V, K] in fp32.
    """

    residual: ClassVar[str] = "o_proj"
    internal: ClassVar[tuple[str, ...]] = ("gk_proj.1",)
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "fla chunk_gla"

    def __init__(self, config: operators.GLA, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        keys, values = config.key_width(hidden_size), config.value_width(hidden_size)
        self.heads = config.n_heads(hidden_size)
        self.key_dim, self.value_dim = config.head_dim, config.value_dim(hidden_size)
        self.gate_normalizer = config.gate_normalizer
        self.q_proj = linear(hidden_size, keys)
        self.k_proj = linear(hidden_size, keys)
        self.v_proj = linear(hidden_size, values)
        self.g_proj = linear(hidden_size, values)
        rank = config.gate_rank
        self.gk_proj = nn.Sequential(linear(hidden_size, rank), linear(rank, keys, bias=True))
        self.g_norm_swish_gate = RMSNorm(self.value_dim, norm_eps)
        self.o_proj = linear(values, hidden_size)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Mixed:
        """Run the recurrence over whole sequences."""
        return gla_chunked(q, k, v, decay)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.heads, self.value_dim, self.key_dim
        return {"recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype))}

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        o, final = self.mix(*self._inputs(x))
        if state is not None:
            state["recurrent"].copy_(final)
        return self._output(o, x)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.decay import log_decay

        x = fla_ops.half(x)
        gate, low = fla_ops.project_apart(x, self.g_proj, self.gk_proj[0])
        decay = log_decay(self.gk_proj[1](low), self.gate_normalizer)
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x), decay
        q, k, v, decay = (t.unflatten(-1, (self.heads, -1)) for t in projected)
        o, final = fla_ops.gla(q, k, v, decay, keep=state is not None)
        if state is not None:
            state["recurrent"].copy_(final)
        gate = gate.unflatten(-1, (self.heads, -1))
        return fla_ops.project(self.g_norm_swish_gate.fused(o, gate).flatten(-2), self.o_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        o, final = gla_step(*self._inputs(x), state["recurrent"])
        state["recurrent"].copy_(final)
        return self._output(o, x)

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Queries, keys, values and log decays, split into heads."""
        gates = self.gk_proj(x)
        decay = F.logsigmoid(gates.to(accumulator(gates.dtype))) / self.gate_normalizer
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x), decay
        return [t.unflatten(-1, (self.heads, -1)) for t in projected]

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1)).to(o.dtype)
        return self.o_proj((self.g_norm_swish_gate(o) * F.silu(gate)).flatten(-2).to(x.dtype))
