"""What the decode steps of all layers share: buffers, merged weights, how most kinds begin and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.model.hybrid import Residual
from archsearch.model.kernels import Kernels
from archsearch.model.kernels.attention import Heads, attention_scratch, rotary_table
from archsearch.model.kernels.convolution import Convolution, Output, padded, value_rows
from archsearch.model.kernels.projection import Epilogue, Norm
from archsearch.model.layers.parts import RMSNorm, ShortConvolution

Launches = list[Callable[[], None]]


@dataclass(slots=True)
class Workspace:
    """What the chains of all layers share. Activations live in buffers that are used again by every layer.

    Attributes:
        kernels: who computes.
        batch: number of sequences.
        capacity: tokens that fit, meta tokens included.
        hidden: [B, hidden], the residual stream.
        position: [] in int64, tokens stored so far.
    """

    kernels: Kernels
    batch: int
    capacity: int
    hidden: Tensor
    position: Tensor
    _buffers: dict[tuple, Tensor] = field(default_factory=dict)
    _scratch: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    def activations(self, name: str, width: int) -> Tensor:
        """The buffer [B, width] of that name."""
        key = name, width
        if key not in self._buffers:
            self._buffers[key] = self.hidden.new_empty(self.batch, width)
        return self._buffers[key]

    def squares(self, groups: int, parts: int) -> Tensor:
        """The buffer [B, groups, parts] of mean squares."""
        key = "squares", groups, parts
        if key not in self._buffers:
            self._buffers[key] = self.hidden.new_empty(self.batch, groups, parts, dtype=torch.float32)
        return self._buffers[key]

    def scratch(self, heads: Heads, slots: int) -> dict[str, Tensor]:
        """What the splits of an attention step share."""
        key = heads, slots
        if key not in self._scratch:
            self._scratch[key] = attention_scratch(self.batch, heads, slots, self.hidden.device)
        return self._scratch[key]

    def rotary(self, dim: int, theta: float) -> Tensor:
        """The rotary embedding's table."""
        key = "rotary", dim, theta
        if key not in self._buffers:
            self._buffers[key] = rotary_table(self.capacity, dim, theta, self.hidden.device)
        return self._buffers[key]

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A state buffer of ``batch`` sequences."""
        return self.hidden.new_zeros(self.batch, *shape, dtype=dtype)


@dataclass(slots=True)
class Chain:
    """One layer's decode step.

    Attributes:
        kind: of the operator.
        launches: its kernels in order.
        state: under the names of ``Layer.allocate_state``; convolutions are rings.
        plain: whether there are no kernels of this kind, and the layer's own step runs instead, on its own state.
    """

    kind: str
    launches: Launches
    state: dict[str, Tensor] = field(default_factory=dict)
    plain: bool = False


def gain_of(norm: RMSNorm) -> Norm:
    """The norm before a layer, as its projection applies it."""
    return Norm(norm.eps, gain=norm.weight.detach())


def merged(*projections: nn.Linear) -> Tensor:
    """One weight for projections of the same input, their outputs side by side."""
    return torch.cat([p.weight.detach() for p in projections]).contiguous()


def projection(layer: Residual, work: Workspace, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Launches]:
    """Norm and input projections of a layer: their output, and the launch."""
    projected = work.activations("projected", len(weight))
    norm = gain_of(layer.norm)
    return projected, [partial(work.kernels.project, work.hidden, weight, projected, Epilogue.PLAIN, norm, bias)]


def residual(work: Workspace, x: Tensor, weight: Tensor, norm: Norm | None = None) -> Launches:
    """Output projection of a layer, added to the residual stream."""
    return [partial(work.kernels.project, x, weight.detach(), work.hidden, Epilogue.RESIDUAL, norm)]


def ring(work: Workspace, *parts: ShortConvolution) -> Convolution:
    """One convolution over the channels of ``parts`` side by side, with an empty ring."""
    weight = torch.cat([p.weight.detach()[:, 0] for p in parts])
    bias = None if parts[0].bias is None else parts[0].bias.detach()
    return Convolution(weight.T.contiguous(), bias, work.zeros(weight.shape[1], weight.shape[0]))


def read_out(work: Workspace, heads: int, value_dim: int, gain: Tensor, groups: int | None = None) -> Output:
    """Where a mixer writes whose output norm is over each head, or over ``groups`` of heads."""
    width = padded(value_dim)
    parts = width // min(width, value_rows(work.batch, heads, value_dim))
    groups = groups or heads
    squares = work.squares(groups, heads // groups * parts)
    return Output(work.activations("mixed", heads * width), squares, gain.detach())


def widened(weight: Tensor, heads: int, value_dim: int) -> Tensor:
    """An output projection [N, heads * value dim] for heads that are padded with zeros."""
    extra = padded(value_dim) - value_dim
    return weight if extra == 0 else F.pad(weight.unflatten(1, (heads, -1)), (0, extra)).flatten(1).contiguous()
