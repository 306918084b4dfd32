"""Mamba-2: a state-space model with one decay a head (SSD), gated and convolved."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from archsearch.operators.base import Recurrent, divide, scaled


class Mamba2(Recurrent):
    """Mamba-2 mixer. ``groups`` of B and C are shared by the heads (1 as in the paper's models)."""

    kind: ClassVar[str] = "m2"

    state: int = Field(128, ge=8, le=256, description="numbers of state a channel (d_state)")
    head_dim: int = Field(64, ge=8, le=256)
    expand: float = Field(2.0, gt=0, le=8)
    groups: int = Field(1, ge=1)

    def inner(self, hidden: int) -> int:
        """Channels of the state-space model."""
        return scaled(hidden, self.expand, "expand")

    def heads(self, hidden: int) -> int:
        """Heads at this width."""
        return divide(self.inner(hidden), self.head_dim, "head_dim must divide expand x hidden_size")

    def check(self, hidden: int) -> None:
        divide(self.heads(hidden), self.groups, "groups must divide the heads")

    def projected(self, hidden: int) -> int:
        """Width of the input projection: gate z, x, B, C and dt."""
        return self.inner(hidden) + self.conv_channels(hidden) + self.heads(hidden)

    def conv_channels(self, hidden: int) -> int:
        return self.inner(hidden) + 2 * self.groups * self.state

    def matmul_parameters(self, hidden: int) -> int:
        return hidden * (self.projected(hidden) + self.inner(hidden))

    def parameters(self, hidden: int) -> int:
        conv = self.conv_channels(hidden) * (self.conv + 1)
        return self.matmul_parameters(hidden) + conv + 3 * self.heads(hidden) + self.inner(hidden)

    def mixing_flops(self, hidden: int, length: int) -> float:
        # decay, outer-product update and read-out of a [inner, state] matrix
        return 5.0 * self.state_numbers(hidden) + 2.0 * self.conv * self.conv_channels(hidden)

    def state_numbers(self, hidden: int) -> int:
        return self.inner(hidden) * self.state
