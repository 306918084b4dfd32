"""What every operator kind states about itself: its options, whether they fit a width, and its cost.

Costs are exact arithmetic on plain numbers, so that the search can refuse an architecture
before anything is built. ``hidden`` is the model width; lengths are tokens; sizes are bytes.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import ConfigDict, Field

from archsearch.schema import Frozen

STATE_BYTES = 4
"""Recurrent states are kept in fp32: rounding them each step would drift over thousands of tokens."""


class OperatorConfig(Frozen):
    """One residual layer ``x + op(RMSNorm(x))``. Subclasses set ``kind`` and the cost methods."""

    model_config = ConfigDict(strict=True)  # true is no number of heads

    kind: ClassVar[str]
    is_mixer: ClassVar[bool] = True
    full_attention: ClassVar[bool] = False

    def check(self, hidden: int) -> None:
        """Raise ValueError when the options do not fit the width ``hidden``."""

    def canonical(self, hidden: int) -> Self:
        """The same operator with every option absent whose value is the one that its absence means."""
        return self

    def parameters(self, hidden: int) -> int:
        """Trainable numbers, without the pre-norm's gain."""
        raise NotImplementedError

    def matmul_parameters(self, hidden: int) -> int:
        """Those of ``parameters`` that multiply activations (2 FLOPs each a token)."""
        raise NotImplementedError

    def mixing_flops(self, hidden: int, length: int) -> float:
        """FLOPs that mix one token with what came before it, averaged over a sequence of ``length``."""
        return 0.0

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        """Memory that decoding one sequence of ``length`` tokens needs; ``width`` bytes an activation."""
        return 0

    def step_bytes(self, hidden: int, length: int, width: int) -> int:
        """State bytes read plus written by one decode step when ``length`` tokens are stored."""
        return 2 * self.state_bytes(hidden, length, width)


class Recurrent(OperatorConfig):
    """Mixers with a matrix state a head, of a size that does not grow with the context."""

    conv: int = Field(4, ge=1, le=8, description="taps of the short causal convolution")

    def state_numbers(self, hidden: int) -> int:
        """Numbers in the recurrent state of one sequence."""
        raise NotImplementedError

    def conv_channels(self, hidden: int) -> int:
        """Channels that pass through the short convolution."""
        raise NotImplementedError

    def state_bytes(self, hidden: int, length: int, width: int) -> int:
        conv = self.conv_channels(hidden) * (self.conv - 1) * width
        return self.state_numbers(hidden) * STATE_BYTES + conv


def divide(total: int, part: int, what: str) -> int:
    """``total / part`` when it is whole; otherwise ValueError with ``what`` as its subject."""
    if total <= 0 or total % part:
        raise ValueError(f"{what}: {part} does not divide {total}")
    return total // part


def scaled(hidden: int, factor: float, what: str) -> int:
    """``hidden * factor`` when it is a whole positive number; otherwise ValueError."""
    value = hidden * factor
    if value < 1 or value != int(value):
        raise ValueError(f"{what}: {hidden} x {factor:g} is not a whole number")
    return int(value)
