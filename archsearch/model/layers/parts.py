"""Parts that several layers share: norms, the short causal convolution, rotary positions, initialisations."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch.model.recurrence import accumulator


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` in fp32, over the last dimension or over each of its ``groups``."""

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.eps = eps
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(accumulator(x.dtype))
        weight = self.weight.to(exact.dtype)
        if self.groups == 1:
            return F.rms_norm(exact, weight.shape, weight, self.eps).to(x.dtype)
        grouped = exact.unflatten(-1, (self.groups, -1))
        return (F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * weight).to(x.dtype)

    def fused(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        gate_first: bool = False,
        activation: str = "silu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``forward`` by one kernel, times ``silu(gate)`` or another ``activation``; as ``dtype``, or that of ``x``."""
        from archsearch.model.fused.norm import norm

        if self.groups == 1:
            return norm(x, self.weight, self.eps, gate, gate_first=gate_first, activation=activation, dtype=dtype)
        parts = (t if t is None else t.unflatten(-1, (self.groups, -1)) for t in (x, gate))
        x, gate = parts
        return norm(x, self.weight, self.eps, gate, gate_first=gate_first, dtype=dtype).flatten(-2)

    def after(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """``x + added`` and its norm, both like ``x``, by one kernel."""
        from archsearch.model.fused.residual import add_norm

        return add_norm(x, added, self.weight, self.eps)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, then SiLU.

    Its cache holds the last ``taps - 1`` inputs, oldest first: [B, taps - 1, channels].
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.init_weights()

    @property
    def taps(self) -> int:
        """Inputs that an output depends on."""
        return self.weight.shape[-1]

    def init_weights(self, generator: Generator | None = None) -> None:
        """Uniform in ±1/sqrt(taps), as torch initialises a depthwise convolution."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.taps**-0.5), self.taps**-0.5, generator=generator)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        """[B, T, channels] to the same, from the start of a sequence; leaves its end in ``cache``."""
        padded = F.pad(x, (0, 0, self.taps - 1, 0))
        if cache is not None:
            cache.copy_(padded[:, x.shape[1] :])
        # as an image of height 1 the layout is torch's channels_last, twice as fast as conv1d on a CPU
        image, weight = padded.mT.unsqueeze(2), self.weight.unsqueeze(2)
        return F.silu(F.conv2d(image, weight, self.bias, groups=x.shape[-1]).squeeze(2).mT)

    @staticmethod
    def keep(x: Tensor, cache: Tensor) -> None:
        """Leave the end of the sequence ``x`` [B, T, channels] in ``cache``."""
        last = x[:, -cache.shape[1] :] if cache.shape[1] else x[:, :0]
        cache.copy_(F.pad(last, (0, 0, cache.shape[1] - last.shape[1], 0)))

    def step(self, x: Tensor, cache: Tensor) -> Tensor:
        """One token, [B, channels]; moves ``cache`` on by one, in place."""
        inputs = torch.cat([cache.to(x.dtype), x[:, None]], dim=1)
        cache.copy_(inputs[:, 1:])
        y = (inputs * self.weight[:, 0].T).sum(1)
        return F.silu(y if self.bias is None else y + self.bias)


def l2_normalize(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, in fp32."""
    x = x.to(accumulator(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), channel i paired with i + D/2 as in Llama and Qwen.

    Args:
        x: [..., T, D].
        positions: [T], or [] for one position, where x is [..., D].
        theta: base of the wavelengths.
    """
    exact, half = accumulator(x.dtype), x.shape[-1] // 2
    # made here rather than kept as a buffer: .to(bfloat16) would round a buffer's frequencies
    frequencies = theta ** -(torch.arange(half, device=x.device, dtype=exact) / half)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(exact).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """A projection; without bias unless asked."""
    return nn.Linear(inputs, outputs, bias=bias)


def init_decay(a_log: Tensor, dt_bias: Tensor, low: float, generator: Generator | None) -> None:
    """Decay rates A uniform in [low, 16] and time steps log-uniform in [0.001, 0.1], as Mamba-2 starts.

    ``a_log`` takes log A, ``dt_bias`` the inverse softplus of the time steps.
    """
    rates = torch.empty_like(a_log, dtype=torch.float32).uniform_(low, 16, generator=generator)
    a_log.copy_(rates.log())
    init_steps(dt_bias, generator)


def init_steps(dt_bias: Tensor, generator: Generator | None) -> None:
    """Time steps log-uniform in [0.001, 0.1]: ``dt_bias`` takes their inverse softplus."""
    ends = math.log(0.001), math.log(0.1)
    steps = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(*ends, generator=generator).exp()
    dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
