"""SwiGLU feed-forward network."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import linear


class FFN(Layer):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); remembers nothing."""

    residual: ClassVar[str] = "down_proj"
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "Triton SwiGLU"

    def __init__(self, config: operators.FFN, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        inner = config.inner(hidden_size)
        self.gate_proj = linear(hidden_size, inner)
        self.up_proj = linear(hidden_size, inner)
        self.down_proj = linear(inner, hidden_size)

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.swiglu import swiglu

        x = fla_ops.half(x)
        return fla_ops.project(swiglu(fla_ops.project(x, self.gate_proj, self.up_proj)), self.down_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        return self.sequence(x, None)
