"""HGRN2: gated linear attention whose keys are what the decays leave open."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from archsearch.operators.base import STATE_BYTES, OperatorConfig, divide


class HGRN2(OperatorConfig):
    """HGRN2 mixer: four square projections; key and value head dims equal (``expand_ratio`` in the original)."""

    kind: ClassVar[str] = "hg"

    head_dim: int = Field(128, ge=8, le=256)

    def n_heads(self, hidden: int) -> int:
        """Heads at this width."""
        return divide(hidden, self.head_dim, "head_dim must divide hidden_size")

    def check(self, hidden: int) -> None:
        self.n_heads(hidden)

    def matmul_parameters(self, hidden: int) -> int:
        return 4 * hidden * hidden

    def parameters(self, hidden: int) -> int:
        return self.matmul_parameters(hidden) + hidden

    def mixing_flops(self, hidden: int, length: int) -> float:
        return 5.0 * self.state_numbers(hidden)

    def state_numbers(self, hidden: int) -> int:
        """Numbers in the recurrent state of one sequence."""
        return hidden * self.head_dim

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        return self.state_numbers(hidden) * STATE_BYTES
