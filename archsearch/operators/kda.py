"""Kimi Delta Attention (KDA): the delta rule with a decay a key channel, and a gated output norm."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from archsearch.operators.gated_delta_net import GatedDeltaNet


class KDA(GatedDeltaNet):
    """KDA mixer. Decays and output gates are low-rank, of rank ``gate_rank``."""

    kind: ClassVar[str] = "kda"

    gate_rank: int | None = Field(None, ge=1, le=256, description="the value head dim when absent, as published")

    def rank(self) -> int:
        """Rank of the decay and of the output gate."""
        return self.gate_rank or self.value_dim()

    def canonical(self, hidden: int) -> Self:
        same = super().canonical(hidden)
        return same.model_copy(update={"gate_rank": None}) if same.rank() == self.value_dim() else same

    def matmul_parameters(self, hidden: int) -> int:
        keys, values = self.key_width(hidden), self.value_width(hidden)
        projected = 2 * keys + 2 * values + self.n_heads(hidden)
        return hidden * projected + self.rank() * (2 * hidden + keys + values)

    def parameters(self, hidden: int) -> int:
        conv = self.conv_channels(hidden) * self.conv
        decay = self.n_heads(hidden) + self.key_width(hidden)
        return self.matmul_parameters(hidden) + conv + decay + self.value_width(hidden) + self.value_dim()
