"""DeltaNet: linear attention that corrects its memory by the delta rule."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from archsearch.operators.base import Recurrent, divide


class DeltaNet(Recurrent):
    """DeltaNet mixer as in the paper's models: no output gate, key and value head dims equal."""

    kind: ClassVar[str] = "d"

    head_dim: int = Field(128, ge=8, le=256)
    heads: int | None = Field(None, ge=1, description="hidden_size / head_dim when absent")

    def n_heads(self, hidden: int) -> int:
        """Heads at this width."""
        return self.heads or divide(hidden, self.head_dim, "head_dim must divide hidden_size")

    def canonical(self, hidden: int) -> Self:
        return self.model_copy(update={"heads": None}) if self.n_heads(hidden) * self.head_dim == hidden else self

    def check(self, hidden: int) -> None:
        self.n_heads(hidden)

    def inner(self, hidden: int) -> int:
        """Width of queries, keys and values each."""
        return self.n_heads(hidden) * self.head_dim

    def conv_channels(self, hidden: int) -> int:
        return 3 * self.inner(hidden)

    def matmul_parameters(self, hidden: int) -> int:
        return hidden * (4 * self.inner(hidden) + self.n_heads(hidden))

    def parameters(self, hidden: int) -> int:
        return self.matmul_parameters(hidden) + self.conv_channels(hidden) * self.conv + self.head_dim

    def mixing_flops(self, hidden: int, length: int) -> float:
        # recall, correction and read-out, each a matrix-vector product a head
        return 6.0 * self.state_numbers(hidden) + 2.0 * self.conv * self.conv_channels(hidden)

    def state_numbers(self, hidden: int) -> int:
        return self.n_heads(hidden) * self.head_dim**2
