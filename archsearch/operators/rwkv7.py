"""RWKV-7: a memory whose transition is diagonal plus low-rank, behind a token shift."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator

from archsearch.operators.base import STATE_BYTES, OperatorConfig, divide

RANK_STEP = 32
"""The published ranks are multiples of this."""


class RWKV7(OperatorConfig):
    """RWKV-7's time mixing. Decays, rates and output gates are low-rank; absent ranks are the published ones."""

    kind: ClassVar[str] = "r7"

    head_dim: int = Field(64, ge=8, le=128)
    decay_rank: int | None = Field(None, ge=1, le=512)
    rate_rank: int | None = Field(None, ge=1, le=512, description="of the in-context learning rates")
    gate_rank: int | None = Field(None, ge=1, le=512)
    value_residual: bool = Field(False, description="not available, see the error")

    @field_validator("value_residual")
    @classmethod
    def _refuse_value_residual(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "r7 has no value residual: it would tie the cost and the values of a layer to the first r7 layer of "
                "the model, and operators stand for themselves; leave value_residual false"
            )
        return value

    def n_heads(self, hidden: int) -> int:
        """Heads at this width."""
        return divide(hidden, self.head_dim, "head_dim must divide hidden_size")

    def check(self, hidden: int) -> None:
        self.n_heads(hidden)

    def ranks(self, hidden: int) -> tuple[int, int, int]:
        """Ranks of decay, rate and gate: the published ones grow with the square root of the width."""
        wide = 2.5 * hidden**0.5 * self.head_dim / 64
        decay, rate = (given or _rank(wide) for given in (self.decay_rank, self.rate_rank))
        return decay, rate, self.gate_rank or _rank(5 * hidden**0.5)

    def canonical(self, hidden: int) -> Self:
        names = "decay_rank", "rate_rank", "gate_rank"
        published = self.model_copy(update=dict.fromkeys(names)).ranks(hidden)
        same = [name for name, mine, theirs in zip(names, self.ranks(hidden), published, strict=True) if mine == theirs]
        return self.model_copy(update=dict.fromkeys(same))

    def matmul_parameters(self, hidden: int) -> int:
        return 4 * hidden * hidden + 2 * hidden * sum(self.ranks(hidden))

    def parameters(self, hidden: int) -> int:
        # six mixes of the token shift, two biases, the key's two scales, the bonus, the output norm
        return self.matmul_parameters(hidden) + (6 + 2 + 2 + 1 + 2) * hidden

    def mixing_flops(self, hidden: int, length: int) -> float:
        # decay, recall, two outer products and read-out of a matrix a head
        return 9.0 * self.state_numbers(hidden)

    def state_numbers(self, hidden: int) -> int:
        """Numbers in the recurrent state of one sequence."""
        return hidden * self.head_dim

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        return self.state_numbers(hidden) * STATE_BYTES + hidden * width


def _rank(size: float) -> int:
    return max(RANK_STEP, round(size / RANK_STEP) * RANK_STEP)
