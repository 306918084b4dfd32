"""Mamba, the first: a selective state-space model with decays of its own for every channel."""

from __future__ import annotations

import math
from typing import ClassVar, Self

from pydantic import Field

from archsearch.operators.base import Recurrent, scaled


class Mamba(Recurrent):
    """Mamba mixer. On a GPU it trains only where mamba-ssm's CUDA extension is built."""

    kind: ClassVar[str] = "m"

    state: int = Field(16, ge=1, le=256, description="numbers of state a channel (d_state)")
    expand: float = Field(2.0, gt=0, le=8)
    dt_rank: int | None = Field(None, ge=1, description="rank of the time steps; hidden_size / 16, rounded up")

    def inner(self, hidden: int) -> int:
        """Channels of the state-space model."""
        return scaled(hidden, self.expand, "expand")

    def rank(self, hidden: int) -> int:
        """Rank of the time steps at this width."""
        return self.dt_rank or math.ceil(hidden / 16)

    def check(self, hidden: int) -> None:
        self.inner(hidden)

    def canonical(self, hidden: int) -> Self:
        return self.model_copy(update={"dt_rank": None}) if self.rank(hidden) == math.ceil(hidden / 16) else self

    def conv_channels(self, hidden: int) -> int:
        return self.inner(hidden)

    def matmul_parameters(self, hidden: int) -> int:
        return self.inner(hidden) * (3 * hidden + 2 * self.rank(hidden) + 2 * self.state)

    def parameters(self, hidden: int) -> int:
        # convolution with bias, decays, skip and the bias of the time steps, all a channel
        return self.matmul_parameters(hidden) + self.inner(hidden) * (self.conv + 1 + self.state + 2)

    def mixing_flops(self, hidden: int, length: int) -> float:
        # the exponent, decay, update and read-out of a [inner, state] matrix
        return 7.0 * self.state_numbers(hidden) + 2.0 * self.conv * self.conv_channels(hidden)

    def state_numbers(self, hidden: int) -> int:
        return self.inner(hidden) * self.state
