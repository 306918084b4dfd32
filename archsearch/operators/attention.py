"""Softmax attention with grouped keys and values (GQA), over everything before or over a window."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from archsearch.operators.base import OperatorConfig, divide


class Attention(OperatorConfig):
    """Causal softmax attention: RoPE, grouped KV heads, optional RMSNorm of queries and keys."""

    kind: ClassVar[str] = "a"
    full_attention: ClassVar[bool] = True

    head_dim: int = Field(128, ge=8, le=256, multiple_of=2)
    heads: int | None = Field(None, ge=1, description="query heads; hidden_size / head_dim when absent")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads; as many as heads when absent")
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_theta: float = Field(10000.0, gt=0)

    def query_heads(self, hidden: int) -> int:
        """Number of query heads at this width."""
        return self.heads or divide(hidden, self.head_dim, "head_dim must divide hidden_size")

    def stored_heads(self, hidden: int) -> int:
        """Number of key and value heads at this width."""
        return self.kv_heads or self.query_heads(hidden)

    def check(self, hidden: int) -> None:
        divide(self.query_heads(hidden), self.stored_heads(hidden), "kv_heads must divide the query heads")

    def canonical(self, hidden: int) -> Self:
        heads = self.query_heads(hidden)
        same = {"heads": heads * self.head_dim == hidden, "kv_heads": self.kv_heads == heads}
        return self.model_copy(update=dict.fromkeys((name for name, drop in same.items() if drop), None))

    def matmul_parameters(self, hidden: int) -> int:
        return 2 * hidden * (self.query_heads(hidden) + self.stored_heads(hidden)) * self.head_dim

    def parameters(self, hidden: int) -> int:
        bias = (self.query_heads(hidden) + 2 * self.stored_heads(hidden)) * self.head_dim if self.qkv_bias else 0
        return self.matmul_parameters(hidden) + bias + (2 * self.head_dim if self.qk_norm else 0)

    def visible(self, length: int) -> int:
        """Tokens that a query sees when ``length`` are stored."""
        return length

    def mixing_flops(self, hidden: int, length: int) -> float:
        seen = _mean_visible(length, self.visible(length))
        return 4.0 * self.query_heads(hidden) * self.head_dim * seen

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        return 2 * self.stored_heads(hidden) * self.head_dim * self.visible(length) * width

    def step_bytes(self, hidden: int, length: int, width: int) -> int:
        row = 2 * self.stored_heads(hidden) * self.head_dim * width
        return row * (self.visible(length) + 1)


class SlidingWindowAttention(Attention):
    """Causal softmax attention over the last ``window`` tokens, the current one included."""

    kind: ClassVar[str] = "w"
    full_attention: ClassVar[bool] = False

    window: int = Field(512, ge=1)

    def visible(self, length: int) -> int:
        return min(length, self.window)


def _mean_visible(length: int, window: int) -> float:
    """Mean number of tokens seen by the queries 1..length, each seeing at most ``window``."""
    grown = window * (window + 1) / 2
    return (grown + (length - window) * window) / max(length, 1)
