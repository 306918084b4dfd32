"""Mamba, the first: a selective state-space model with decays of its own for every channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import selective_scan_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import ShortConvolution, init_steps, linear
from archsearch.model.recurrence import Mixed, accumulator, selective_scan_step
from archsearch.model.requirements import require_mamba


class Mamba(Layer):
    """Mamba (arXiv 2312.00752, section 3.4), its weights named as in mamba-ssm; ``A_log`` is a vector here.

    State: ``conv`` [B, taps - 1, inner] and ``recurrent`` [B, inner, state] in fp32.
    """

    residual: ClassVar[str] = "out_proj"
    internal: ClassVar[tuple[str, ...]] = ("x_proj", "dt_proj")
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "mamba-ssm selective_scan_cuda"

    def __init__(self, config: operators.Mamba, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.inner, self.state_size = config.inner(hidden_size), config.state
        self.rank = config.rank(hidden_size)
        self.in_proj = linear(hidden_size, 2 * self.inner)
        self.conv1d = ShortConvolution(self.inner, config.conv, bias=True)
        self.x_proj = linear(self.inner, self.rank + 2 * self.state_size)
        self.dt_proj = linear(self.rank, self.inner, bias=True)
        # a vector, since weight decay is for matrices
        self.A_log = nn.Parameter(torch.zeros(self.inner * self.state_size))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = linear(self.inner, hidden_size)

    def require(self) -> None:
        """Raise EnvironmentUnfit where mamba-ssm's CUDA extension is not built."""
        require_mamba()

    def mix(self, c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor) -> Mixed:
        """Run the recurrence over whole sequences; shapes as in ``selective_scan_chunked``."""
        return selective_scan_chunked(c, b, x, dt, rate)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.inner, self.state_size
        return {
            "conv": torch.zeros(batch, self.conv1d.taps - 1, self.inner, device=device, dtype=dtype),
            "recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype)),
        }

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        channels, z = self.in_proj(x).chunk(2, dim=-1)
        values = self.conv1d(channels, None if state is None else state["conv"])
        o, final = self.mix(*self._inputs(values), self.rates())
        if state is not None:
            state["recurrent"].copy_(final)
        return self._output(o, values, z)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.convolution import convolve_within

        projected = self.in_proj(fla_ops.half(x))
        # one part alone, in heads that only say how a program of the kernel divides it
        weights, biases = (list(t.split([self.inner, 0, 0])) for t in (self.conv1d.weight, self.conv1d.bias))
        dims = [math.gcd(self.inner, 128)] * 3
        (values, *_), _, z = convolve_within(projected, 0, weights, biases, dims, normed=0)
        values = values.flatten(-2)
        low, b, c = self._projected(values)
        # the scan wants time last, and this product gives it
        steps = (self.dt_proj.weight.to(low.dtype) @ low.mT).mT
        rates, skip, bias = self.rates(), self.D.float(), self.dt_proj.bias.float()
        o, final = fla_ops.selective_scan(c, b, values, steps, rates, skip, z, bias, keep=state is not None)
        if state is not None:
            ShortConvolution.keep(projected[..., : self.inner], state["conv"])
            state["recurrent"].copy_(final)
        return self.out_proj(o)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        channels, z = self.in_proj(x).chunk(2, dim=-1)
        values = self.conv1d.step(channels, state["conv"])
        o, final = selective_scan_step(*self._inputs(values), self.rates(), state["recurrent"])
        state["recurrent"].copy_(final)
        return self._output(o, values, z)

    def rates(self) -> Tensor:
        """A [inner, state], negative."""
        return -self.A_log.to(accumulator(self.A_log.dtype)).exp().unflatten(0, (self.inner, -1))

    def _projected(self, values: Tensor) -> tuple[Tensor, ...]:
        """The low-rank time steps, B and C."""
        return self.x_proj(values).split([self.rank, self.state_size, self.state_size], dim=-1)

    def _inputs(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C, B, the values and the time steps."""
        low, b, c = self._projected(values)
        steps = self.dt_proj(low)
        return c, b, values, F.softplus(steps.to(accumulator(steps.dtype)))

    def _output(self, o: Tensor, values: Tensor, z: Tensor) -> Tensor:
        gated = (o + self.D.to(o.dtype) * values) * F.silu(z.to(o.dtype))
        return self.out_proj(gated.to(z.dtype))

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        super().init_weights(generator, residual_std)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5, generator=generator)
        init_steps(self.dt_proj.bias, generator)
        # S4D-real: the decays of a channel are 1, 2, 3, ...
        rates = torch.arange(1, self.state_size + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(rates.log().repeat(self.inner))
        nn.init.ones_(self.D)
