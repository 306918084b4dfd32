"""Mamba-2: a state-space model with one decay a head (SSD), gated and convolved."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import ssd_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import RMSNorm, ShortConvolution, init_decay, linear
from archsearch.model.recurrence import Mixed, accumulator, ssd_step
from archsearch.model.requirements import installed


class Mamba2(Layer):
    """Mamba-2 (arXiv 2405.21060), its weights named and ordered as in mamba-ssm.

    State: ``conv`` [B, taps - 1, channels of x, B, C side by side] and ``recurrent`` [B, heads, head_dim, state]
    in fp32.
    """

    residual: ClassVar[str] = "out_proj"
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")

    def __init__(self, config: operators.Mamba2, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.inner, self.heads = config.inner(hidden_size), config.heads(hidden_size)
        self.groups, self.state_size = config.groups, config.state
        self.channels = config.conv_channels(hidden_size)
        self.in_proj = linear(hidden_size, config.projected(hidden_size))
        self.conv1d = ShortConvolution(self.channels, config.conv, bias=True)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.norm = RMSNorm(self.inner, norm_eps, groups=self.groups)
        self.out_proj = linear(self.inner, hidden_size)

    @property
    def implementation(self) -> str:
        if self.path == "torch":
            return self.path
        return "mamba-ssm scan" if installed("mamba_ssm") else "fla chunk_simple_gla"

    def mix(self, c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor) -> Mixed:
        """Run the recurrence over whole sequences.

        Args:
            c: [B, T, groups, state], reads the state.
            b: [B, T, groups, state], writes to it.
            x: [B, T, heads, head_dim].
            dt: [B, T, heads] in fp32.
            rate: [heads], A (negative).
        """
        return ssd_chunked(c, b, x * dt[..., None], dt * rate)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.heads, self.inner // self.heads, self.state_size
        return {
            "conv": torch.zeros(batch, self.conv1d.taps - 1, self.channels, device=device, dtype=dtype),
            "recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype)),
        }

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        z, channels, dt = self._projected(x)
        c, b, values = self._parts(self.conv1d(channels, None if state is None else state["conv"]))
        o, final = self.mix(c, b, values, dt, self._rate())
        if state is not None:
            state["recurrent"].copy_(final)
        return self._output(o, values, z)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.convolution import convolve_within

        projected = self.in_proj(fla_ops.half(x))
        shared = self.groups * self.state_size
        weights, biases = (t.split([self.inner, shared, shared]) for t in (self.conv1d.weight, self.conv1d.bias))
        dims = [self.inner // self.heads, self.state_size, self.state_size]
        parts, z, dt = convolve_within(projected, self.inner, list(weights), list(biases), dims, normed=0)
        values, b, c = parts
        o, final = fla_ops.ssd(c, b, values, dt, self._rate(), self.D, self.dt_bias, keep=state is not None)
        if state is not None:
            ShortConvolution.keep(projected.narrow(-1, self.inner, self.channels), state["conv"])
            state["recurrent"].copy_(final)
        return fla_ops.project(self.norm.fused(o.flatten(-2), z, gate_first=True), self.out_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        z, channels, dt = self._projected(x)
        c, b, values = self._parts(self.conv1d.step(channels, state["conv"]))
        o, final = ssd_step(c, b, values * dt[..., None], dt * self._rate(), state["recurrent"])
        state["recurrent"].copy_(final)
        return self._output(o, values, z)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z, channels of the convolution, and time steps dt in fp32."""
        z, channels, dt = self.in_proj(x).split([self.inner, self.channels, self.heads], dim=-1)
        exact = accumulator(dt.dtype)
        return z, channels, F.softplus(dt.to(exact) + self.dt_bias.to(exact))

    def _parts(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C, B and the values, split into groups and heads."""
        shared = self.groups * self.state_size
        x, b, c = channels.split([self.inner, shared, shared], dim=-1)
        b, c = (t.unflatten(-1, (self.groups, -1)) for t in (b, c))
        return c, b, x.unflatten(-1, (self.heads, -1))

    def _rate(self) -> Tensor:
        return -self.A_log.to(accumulator(self.A_log.dtype)).exp()

    def _output(self, o: Tensor, values: Tensor, z: Tensor) -> Tensor:
        skip = self.D.to(o.dtype)[:, None] * values
        gated = (o + skip).flatten(-2) * F.silu(z.to(o.dtype))
        return self.out_proj(self.norm(gated).to(z.dtype))

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        super().init_weights(generator, residual_std)
        init_decay(self.A_log, self.dt_bias, 1.0, generator)
        nn.init.ones_(self.D)
