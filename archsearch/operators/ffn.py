"""SwiGLU feed-forward network."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from archsearch.operators.base import OperatorConfig


class FFN(OperatorConfig):
    """``down(silu(gate(x)) * up(x))``; its width is ``ratio x hidden_size``, rounded down to ``multiple_of``."""

    kind: ClassVar[str] = "f"
    is_mixer: ClassVar[bool] = False

    ratio: float = Field(3.0, gt=0, le=32)
    multiple_of: int = Field(128, ge=1)

    def inner(self, hidden: int) -> int:
        """Width between the projections."""
        return int(self.ratio * hidden) // self.multiple_of * self.multiple_of

    def check(self, hidden: int) -> None:
        if self.inner(hidden) == 0:
            raise ValueError(f"ratio {self.ratio:g} of {hidden} is below multiple_of {self.multiple_of}")

    def matmul_parameters(self, hidden: int) -> int:
        return 3 * hidden * self.inner(hidden)

    def parameters(self, hidden: int) -> int:
        return self.matmul_parameters(hidden)
