"""What every layer offers: whole sequences, and one token at a time from a static state."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from archsearch.model.layers.parts import RMSNorm, ShortConvolution

State = dict[str, Tensor]
"""What a layer remembers of its sequences while it decodes: buffers of fixed shape, changed in place."""


class Layer(nn.Module):
    """The ``op`` of a residual layer ``x + op(RMSNorm(x))``, built as ``LayerCls(config, hidden_size, norm_eps)``.

    ``forward`` is causal and differentiable. ``prefill`` and ``step`` give the same outputs, and write
    what they saw into a state made by ``allocate_state``. Subclasses write ``sequence`` and ``step``.
    """

    path: str = "torch"
    """Which implementation ``forward`` runs: one of ``paths``."""

    paths: ClassVar[tuple[str, ...]] = ("torch",)
    """Implementations that there are: ``torch`` is the reference, ``fla`` the GPU kernels (``fused``)."""

    kernels: ClassVar[str] = ""
    """What ``fla`` runs, as records name it."""

    caveat: str = ""
    """What records add to the name of the kernels that run."""

    residual: ClassVar[str]
    """Name of the projection whose output is added to the residual stream."""

    internal: ClassVar[tuple[str, ...]] = ()
    """Names of projections between inner features, which neither read nor write the residual stream."""

    def stream_matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of the projections that read the residual stream, and of the one that writes to it."""
        linears = {name: part.weight for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        reading = [weight for name, weight in linears.items() if name not in (self.residual, *self.internal)]
        return reading, [linears[self.residual]]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        return self.sequence(x, None) if self.path == "torch" else self.fused(x, None)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed buffers for ``batch`` sequences of at most ``length`` tokens; ``dtype`` is that of activations."""
        return {}

    def prefill(self, x: Tensor, state: State) -> Tensor:
        """Like ``forward``; starts ``state`` anew and leaves it as if the tokens of ``x`` had been stepped."""
        return self.sequence(x, state) if self.path == "torch" else self.fused(x, state)

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        """``forward``, or ``prefill`` when there is a state to fill."""
        raise NotImplementedError

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        """``sequence`` through the GPU kernels, in 16 bits; by itself ``sequence``, with a ``mix`` that looks at
        ``path``.
        """
        return self.sequence(x, state)

    def unsupported(self) -> tuple[str, str] | None:
        """Which option the GPU kernels cannot take, and what they would take; None where they take all."""
        return None

    def require(self) -> None:
        """Raise EnvironmentUnfit where what the GPU kernels of this kind need beyond fla is missing."""

    @property
    def implementation(self) -> str:
        """What ``forward`` runs now, as records name it."""
        return self.path if self.path == "torch" else self.kernels

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        """One token, [B, hidden] to [B, hidden].

        ``state`` changes in place and nothing waits for the device, so that a CUDA graph can hold the step.

        Args:
            x: the token's activations.
            state: what ``prefill`` and earlier steps left.
            position: int64 [], number of tokens before this one.
        """
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        """Normal with std 0.02, ``residual_std`` for the projection back; biases 0, gains 1, parts as they say."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                std = residual_std if name == self.residual else 0.02
                nn.init.normal_(part.weight, std=std, generator=generator)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, ShortConvolution):
                part.init_weights(generator)
            elif isinstance(part, RMSNorm):
                nn.init.ones_(part.weight)
