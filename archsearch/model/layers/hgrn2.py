"""HGRN2: gated linear attention whose keys are what the decays leave open."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import gla_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import RMSNorm, linear
from archsearch.model.recurrence import Mixed, accumulator, gla_step


class HGRN2(Layer):
    """HGRN2 (arXiv 2404.07904), its weights named as in flash-linear-attention.

    The forget gate ``f = sigmoid(f_proj(x))`` decays the memory and ``1 - f`` is the key (equation 7). The lower
    bounds of the gates, which the original shares between its layers, are 0 here, as in its first layer: an operator
    must not depend on its neighbours.

    State: ``recurrent`` [B, heads, V, K] in fp32.
    """

    residual: ClassVar[str] = "o_proj"
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "fla chunk_gla"

    def __init__(self, config: operators.HGRN2, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_heads(hidden_size), config.head_dim
        self.q_proj = linear(hidden_size, hidden_size)
        self.f_proj = linear(hidden_size, hidden_size)
        self.i_proj = linear(hidden_size, hidden_size)
        self.g_norm = RMSNorm(hidden_size, norm_eps)
        self.o_proj = linear(hidden_size, hidden_size)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Mixed:
        """Run the recurrence over whole sequences."""
        return gla_chunked(q, k, v, decay)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.heads, self.head_dim, self.head_dim
        return {"recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype))}

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        o, final = self.mix(*self._inputs(x))
        if state is not None:
            state["recurrent"].copy_(final)
        return self._output(o, x)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.forget import forget_gates

        inputs = forget_gates(fla_ops.project(fla_ops.half(x), self.q_proj, self.f_proj, self.i_proj))
        heads = (t.unflatten(-1, (self.heads, -1)) for t in inputs)
        o, final = fla_ops.gla(*heads, keep=state is not None)
        if state is not None:
            state["recurrent"].copy_(final)
        return fla_ops.project(self.g_norm.fused(o.flatten(-2)), self.o_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        o, final = gla_step(*self._inputs(x), state["recurrent"])
        state["recurrent"].copy_(final)
        return self._output(o, x)

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Queries, keys, values and log decays, split into heads."""
        forget = self.f_proj(x)
        exact = forget.to(accumulator(forget.dtype))
        inputs = F.silu(self.q_proj(x)), (-exact).sigmoid(), self.i_proj(x), F.logsigmoid(exact)
        return [t.unflatten(-1, (self.heads, -1)) for t in inputs]

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.g_norm(o.flatten(-2)).to(x.dtype))
