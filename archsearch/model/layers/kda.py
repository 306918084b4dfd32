"""Kimi Delta Attention (KDA): the delta rule with a decay a key channel, and a gated output norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.layers.delta_net import DeltaRule
from archsearch.model.layers.parts import RMSNorm, init_decay, linear
from archsearch.model.recurrence import accumulator


class KDA(DeltaRule):
    """Kimi Delta Attention (arXiv 2510.26692), its weights named as in flash-linear-attention.

    Log decay ``-exp(A_log) softplus(f_proj(x) + dt_bias)`` a key channel; output ``RMSNorm(o) sigmoid(g_proj(x))``.
    """

    kernels: ClassVar[str] = "fla chunk_kda"
    internal: ClassVar[tuple[str, ...]] = ("f_proj.1", "g_proj.1")

    def __init__(self, config: operators.KDA, hidden_size: int, norm_eps: float = 1e-6) -> None:
        heads, value_dim, rank = config.n_heads(hidden_size), config.value_dim(), config.rank()
        super().__init__(hidden_size, heads, config.head_dim, value_dim, config.conv)
        keys, _, values = self.widths
        self.f_proj = nn.Sequential(linear(hidden_size, rank), linear(rank, keys))
        self.g_proj = nn.Sequential(linear(hidden_size, rank), linear(rank, values, bias=True))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(keys))
        self.o_norm = RMSNorm(value_dim, norm_eps)

    def decay(self, x: Tensor) -> Tensor:
        exact = accumulator(x.dtype)
        steps = F.softplus(self.f_proj(x).to(exact) + self.dt_bias.to(exact))
        return -self.A_log.to(exact).exp()[:, None] * steps.unflatten(-1, (self.heads, -1))

    def normed(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o) * self.g_proj(x).unflatten(-1, (self.heads, -1)).to(o.dtype).sigmoid()

    def mix_fused(
        self, q: Tensor, k: Tensor, v: Tensor, behind: Tensor, x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        beta = behind[..., : self.heads]
        low_decay, low_gate = fla_ops.project(x, self.f_proj[0], self.g_proj[0]).chunk(2, dim=-1)
        decay, gate = (t.unflatten(-1, (self.heads, -1)) for t in (self.f_proj[1](low_decay), self.g_proj[1](low_gate)))
        o, final = fla_ops.kda(q, k, v, beta, decay, self.A_log, self.dt_bias, keep=keep)
        return self.o_norm.fused(o, gate, activation="sigmoid"), final

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        super().init_weights(generator, residual_std)
        init_decay(self.A_log, self.dt_bias, 1.0, generator)
