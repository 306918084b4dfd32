"""Gated linear attention (GLA): linear attention with a decay a key channel."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from archsearch.operators.base import STATE_BYTES, OperatorConfig, divide, scaled


class GLA(OperatorConfig):
    """GLA mixer with output gate, as published: no convolution, low-rank decay."""

    kind: ClassVar[str] = "gl"

    head_dim: int = Field(128, ge=8, le=256, description="of queries and keys")
    expand_k: float = Field(0.5, gt=0, le=4)
    expand_v: float = Field(1.0, gt=0, le=4)
    gate_rank: int = Field(16, ge=1)
    gate_normalizer: float = Field(16.0, gt=0, description="divides the log decay")

    def key_width(self, hidden: int) -> int:
        """Width of queries, keys and decays each."""
        return scaled(hidden, self.expand_k, "expand_k")

    def value_width(self, hidden: int) -> int:
        """Width of values, output gate and read-out each."""
        return scaled(hidden, self.expand_v, "expand_v")

    def n_heads(self, hidden: int) -> int:
        """Heads at this width."""
        return divide(self.key_width(hidden), self.head_dim, "head_dim must divide expand_k x hidden_size")

    def value_dim(self, hidden: int) -> int:
        """Width of a value head."""
        return divide(self.value_width(hidden), self.n_heads(hidden), "the heads must divide expand_v x hidden_size")

    def check(self, hidden: int) -> None:
        self.value_dim(hidden)

    def matmul_parameters(self, hidden: int) -> int:
        keys, values = self.key_width(hidden), self.value_width(hidden)
        return hidden * (2 * keys + 3 * values) + self.gate_rank * (hidden + keys)

    def parameters(self, hidden: int) -> int:
        return self.matmul_parameters(hidden) + self.key_width(hidden) + self.value_dim(hidden)

    def mixing_flops(self, hidden: int, length: int) -> float:
        return 5.0 * self.state_numbers(hidden)

    def state_numbers(self, hidden: int) -> int:
        """Numbers in the recurrent state of one sequence."""
        return self.key_width(hidden) * self.value_dim(hidden)

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        return self.state_numbers(hidden) * STATE_BYTES
