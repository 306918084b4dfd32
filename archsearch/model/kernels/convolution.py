"""What the decode steps of the linear mixers share: the short convolution, and where a read-out goes.

A program of a mixer holds some value rows of one head's state [V, K]. Of the output norm it leaves a part of the
mean square, which the projection that follows sums and applies (``Norm.squares``).

Convolutions keep their last ``taps`` inputs in a ring [B, taps, channels], the input of position p in slot p mod
taps: no program reads the slot that another one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import power_of_two, silu


@dataclass(frozen=True, slots=True)
class Convolution:
    """A short causal convolution with SiLU.

    Attributes:
        weight: [taps, channels], oldest first.
        bias: [channels] or None.
        ring: [B, taps, channels], changed in place.
    """

    weight: Tensor
    bias: Tensor | None
    ring: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """Where a read-out goes.

    Attributes:
        mixed: [B, heads * padded value dim]; heads are padded to a power of two with zeros.
        squares: [B, groups, parts] in fp32.
        gain: of the output norm, [value dim], or [heads * value dim] for Mamba-2.
    """

    mixed: Tensor
    squares: Tensor
    gain: Tensor


@triton.jit
def past(ring, weight, channel, inside, here, channels, TAPS: tl.constexpr):
    """What the earlier inputs of ``channel`` add to its convolution."""
    total = tl.zeros(channel.shape, tl.float32)
    for back in tl.static_range(1, TAPS):
        slot = (here + TAPS - back) % TAPS
        x = tl.load(ring + slot * channels + channel, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        total += x * tl.load(weight + (TAPS - 1 - back) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def present(total, x, ring, weight, bias, channel, inside, here, writes, channels, TAPS: tl.constexpr,
            BIAS: tl.constexpr):  # fmt: skip
    """Finish the convolution that ``past`` began with the input ``x``, and store that input if ``writes``."""
    total += x.to(tl.float32) * tl.load(
        weight + (TAPS - 1) * channels + channel, mask=inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(ring + (here % TAPS) * channels + channel, x.to(ring.dtype.element_ty), mask=inside & writes)
    return silu(total)


def value_rows(batch: int, heads: int, value_dim: int) -> int:
    """Value rows a program: few enough that the programs fill a GPU of 132 processors."""
    rows = power_of_two(value_dim)
    while rows > 8 and batch * heads * -(-value_dim // rows) < 128:
        rows //= 2
    return min(rows, 16)


def padded(value_dim: int) -> int:
    """Value dim of a head in ``Output.mixed``."""
    return max(16, power_of_two(value_dim))


def convolve(convolution: Convolution, x: Tensor, position: Tensor) -> Tensor:
    """Take the input ``x`` [B, channels] and give the output in fp32: ``past`` and ``present`` in plain torch."""
    taps = len(convolution.weight)
    slots = (position + 1 + torch.arange(taps, device=x.device)) % taps
    convolution.ring.index_copy_(1, slots[-1:], x[:, None].to(convolution.ring.dtype))
    inputs = torch.cat([convolution.ring[:, slots[:-1]].float(), x[:, None].float()], dim=1)
    total = (inputs * convolution.weight.float()).sum(1)
    return F.silu(total if convolution.bias is None else total + convolution.bias.float())


def emit(output: Output, o: Tensor, gate: Tensor | None, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
    """Write the read-out ``o`` [B, heads, V] as the kernels do: with gain and gate, its norm left to the reader."""
    mean = o.square().mean(-1, keepdim=True)
    output.squares.zero_()
    output.squares[..., :1] = mean
    y = o * output.gain.float()
    y = y if gate is None else y * activation(gate.float())
    width = output.mixed.shape[1] // o.shape[1]
    output.mixed.copy_(F.pad(y, (0, width - y.shape[-1])).flatten(1))
