"""Gated DeltaNet: the delta rule with a decay a head, and a gated output norm."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from archsearch.operators.base import Recurrent, divide, scaled


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet mixer. ``expand_v`` widens the values (2 in the original, 1 here)."""

    kind: ClassVar[str] = "gd"

    head_dim: int = Field(128, ge=8, le=256, description="of queries and keys")
    heads: int | None = Field(None, ge=1, description="hidden_size / head_dim when absent")
    expand_v: float = Field(1.0, gt=0, le=4)

    def n_heads(self, hidden: int) -> int:
        """Heads at this width."""
        return self.heads or divide(hidden, self.head_dim, "head_dim must divide hidden_size")

    def value_dim(self) -> int:
        """Width of a value head."""
        return scaled(self.head_dim, self.expand_v, "expand_v")

    def canonical(self, hidden: int) -> Self:
        return self.model_copy(update={"heads": None}) if self.n_heads(hidden) * self.head_dim == hidden else self

    def check(self, hidden: int) -> None:
        self.n_heads(hidden)
        self.value_dim()

    def key_width(self, hidden: int) -> int:
        """Width of queries and keys each."""
        return self.n_heads(hidden) * self.head_dim

    def value_width(self, hidden: int) -> int:
        """Width of values, output gate and read-out each."""
        return self.n_heads(hidden) * self.value_dim()

    def conv_channels(self, hidden: int) -> int:
        return 2 * self.key_width(hidden) + self.value_width(hidden)

    def matmul_parameters(self, hidden: int) -> int:
        projected = 2 * self.key_width(hidden) + 3 * self.value_width(hidden) + 2 * self.n_heads(hidden)
        return hidden * projected

    def parameters(self, hidden: int) -> int:
        conv = self.conv_channels(hidden) * self.conv
        return self.matmul_parameters(hidden) + conv + 2 * self.n_heads(hidden) + self.value_dim()

    def mixing_flops(self, hidden: int, length: int) -> float:
        return 7.0 * self.state_numbers(hidden) + 2.0 * self.conv * self.conv_channels(hidden)

    def state_numbers(self, hidden: int) -> int:
        return self.n_heads(hidden) * self.head_dim * self.value_dim()
