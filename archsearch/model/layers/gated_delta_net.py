"""Gated DeltaNet: the delta rule with a decay a head, and a gated output norm."""

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


class GatedDeltaNet(DeltaRule):
    """Gated DeltaNet (arXiv 2412.06464), its weights named as in flash-linear-attention."""

    kernels: ClassVar[str] = "fla chunk_gated_delta_rule"

    def __init__(self, config: operators.GatedDeltaNet, hidden_size: int, norm_eps: float = 1e-6) -> None:
        heads, value_dim = config.n_heads(hidden_size), config.value_dim()
        super().__init__(hidden_size, heads, config.head_dim, value_dim, config.conv)
        self.a_proj = linear(hidden_size, heads)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.g_proj = linear(hidden_size, heads * value_dim)
        self.o_norm = RMSNorm(value_dim, norm_eps)

    def decay(self, x: Tensor) -> Tensor:
        exact = accumulator(x.dtype)
        return -self.A_log.to(exact).exp() * F.softplus(self.a_proj(x).to(exact) + self.dt_bias.to(exact))

    def normed(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o) * F.silu(self.g_proj(x).unflatten(-1, (self.heads, -1)).to(o.dtype))

    def mix_fused(
        self, q: Tensor, k: Tensor, v: Tensor, behind: Tensor, x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        beta = behind[..., : self.heads]
        gate, decay = fla_ops.project_apart(x, self.g_proj, self.a_proj)
        o, final = fla_ops.gated_delta_rule(q, k, v, beta, decay, self.A_log, self.dt_bias, keep=keep)
        return self.o_norm.fused(o, gate.unflatten(-1, (self.heads, -1))), final

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        super().init_weights(generator, residual_std)
        init_decay(self.A_log, self.dt_bias, 1e-3, generator)
