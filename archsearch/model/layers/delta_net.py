"""DeltaNet: linear attention that corrects its memory by the delta rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import delta_rule_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import RMSNorm, ShortConvolution, l2_normalize, linear
from archsearch.model.recurrence import Mixed, accumulator, delta_rule_step


class DeltaRule(Layer):
    """The common part of DeltaNet and Gated DeltaNet; they add their gates and output norms.

    State: ``conv`` [B, taps - 1, channels of q, k, v side by side] and ``recurrent`` [B, heads, V, K] in fp32.
    """

    residual: ClassVar[str] = "o_proj"
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")

    def __init__(self, hidden_size: int, heads: int, key_dim: int, value_dim: int, taps: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.taps = heads, key_dim, value_dim, taps
        self.widths = [heads * key_dim, heads * key_dim, heads * value_dim]
        for name, width in zip("qkv", self.widths, strict=True):
            self.add_module(f"{name}_proj", linear(hidden_size, width))
            self.add_module(f"{name}_conv1d", ShortConvolution(width, taps))
        self.b_proj = linear(hidden_size, heads)
        self.o_proj = linear(self.widths[2], hidden_size)

    def decay(self, x: Tensor) -> Tensor | None:
        """Log decay of the memory [..., heads], or None where it keeps everything."""
        raise NotImplementedError

    def normed(self, o: Tensor, x: Tensor) -> Tensor:
        """The read-out ``o`` [..., heads, V] after the output norm."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> Mixed:
        """Run the recurrence over whole sequences."""
        return delta_rule_chunked(l2_normalize(q), l2_normalize(k), v, beta, decay)

    def mix_fused(
        self, q: Tensor, k: Tensor, v: Tensor, behind: Tensor, x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence over normalised heads through a kernel, then the output norm.

        The first columns of ``behind`` are ``beta`` as projected, before its sigmoid; ``x`` gives the other gates.
        """
        raise NotImplementedError

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.heads, self.value_dim, self.key_dim
        return {
            "conv": torch.zeros(batch, self.taps - 1, sum(self.widths), device=device, dtype=dtype),
            "recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype)),
        }

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        caches = (None,) * 3 if state is None else self._caches(state)
        convolved = [conv(p, cache) for (p, conv), cache in zip(self._projected(x), caches, strict=True)]
        o, final = self.mix(*self._heads(convolved), self._beta(x), self.decay(x))
        if state is not None:
            state["recurrent"].copy_(final)
        return self._output(o, x)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.convolution import convolve

        x = fla_ops.half(x)
        layers = self.q_proj, self.k_proj, self.v_proj, self.b_proj
        projected = fla_ops.project(x, *layers, multiple=fla_ops.ALIGNED)
        weights = [conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        dims = [self.key_dim, self.key_dim, self.value_dim]
        q, k, v, behind = convolve(projected, weights, None, dims, normed=2)
        o, final = self.mix_fused(q, k, v, behind, x, keep=state is not None)
        if state is not None:
            ShortConvolution.keep(projected[..., : sum(self.widths)], state["conv"])
            state["recurrent"].copy_(final)
        return fla_ops.project(o.flatten(-2), self.o_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        caches = self._caches(state)
        convolved = [conv.step(p, cache) for (p, conv), cache in zip(self._projected(x), caches, strict=True)]
        q, k, v = self._heads(convolved)
        beta, decay = self._beta(x), self.decay(x)
        o, final = delta_rule_step(l2_normalize(q), l2_normalize(k), v, beta, decay, state["recurrent"])
        state["recurrent"].copy_(final)
        return self._output(o, x)

    def _projected(self, x: Tensor) -> Iterator[tuple[Tensor, ShortConvolution]]:
        yield self.q_proj(x), self.q_conv1d
        yield self.k_proj(x), self.k_conv1d
        yield self.v_proj(x), self.v_conv1d

    def _caches(self, state: State) -> list[Tensor]:
        """The parts of the convolution cache that belong to q, k and v."""
        starts = 0, self.widths[0], 2 * self.widths[0]
        return [state["conv"].narrow(-1, at, width) for at, width in zip(starts, self.widths, strict=True)]

    def _heads(self, projected: list[Tensor]) -> list[Tensor]:
        return [t.unflatten(-1, (self.heads, -1)) for t in projected]

    def _beta(self, x: Tensor) -> Tensor:
        beta = self.b_proj(x)
        return beta.to(accumulator(beta.dtype)).sigmoid()

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.normed(o, x).flatten(-2).to(x.dtype))


class DeltaNet(DeltaRule):
    """DeltaNet (arXiv 2406.06484) as in flash-linear-attention and the paper's models: no gates."""

    kernels: ClassVar[str] = "Triton and fla delta rule"

    def __init__(self, config: operators.DeltaNet, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__(hidden_size, config.n_heads(hidden_size), config.head_dim, config.head_dim, config.conv)
        self.o_norm = RMSNorm(config.head_dim, norm_eps)

    def decay(self, x: Tensor) -> Tensor | None:
        return None

    def mix_fused(
        self, q: Tensor, k: Tensor, v: Tensor, behind: Tensor, x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        return fla_ops.delta_rule(q, k, v, behind, self.o_norm.weight, self.o_norm.eps, keep=keep)

    def normed(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o)
