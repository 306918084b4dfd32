"""Runtimes: decoding one token a sequence over and over, from static buffers.

A step embeds ``token``, runs every operator, the head and the argmax, writes the winner back into
``token`` and moves the position on. Nothing in it depends on the host.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from archsearch.errors import UsageError
from archsearch.model.hybrid import DecodeState, HybridLM


class Runtime(Protocol):
    """What ``measure_decode`` times. On a GPU nothing here waits for the device but ``position``.

    Attributes:
        path: which implementation runs.
        token: int64 [B], the token that the next step reads: what the last one chose.
        logits: [B, vocab], those of the last step.
        kernels: launches of one operator of each kind, and of ``head``; empty where nobody counts them.
    """

    path: str
    token: Tensor
    logits: Tensor

    @property
    def kernels(self) -> dict[str, int]: ...

    def begin(self) -> None:
        """Forget all tokens; meta tokens are read again."""
        ...

    def feed(self, token: Tensor) -> None:
        """Make ``token`` [B] the one that the next step reads."""
        ...

    def load(self, state: DecodeState, token: Tensor) -> None:
        """Go on from ``state``, of this batch or of one sequence for all, with ``token`` [B]."""
        ...

    def seek(self, tokens: int) -> None:
        """Go on as if ``tokens`` tokens had been decoded; caches keep whatever they hold.

        Raises:
            UsageError: beyond the room for tokens.
        """
        ...

    def position(self) -> int:
        """Tokens decoded so far, as the device counts them."""
        ...

    def step(self) -> None:
        """Decode one token a sequence."""
        ...


class TorchRuntime:
    """The model's own step, launched from Python. ``tokens`` is the capacity of its state."""

    path = "torch step"
    kernels: dict[str, int] = {}

    def __init__(self, model: HybridLM, batch: int, tokens: int) -> None:
        weight = model.embed_tokens.weight
        self.model = model
        self.state = model.allocate_state(batch, tokens)
        self.token = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.logits = torch.zeros(batch, model.architecture.vocab_size, dtype=weight.dtype, device=weight.device)

    def begin(self) -> None:
        self.model.begin(self.state)

    def feed(self, token: Tensor) -> None:
        self.token.copy_(token)

    def load(self, state: DecodeState, token: Tensor) -> None:
        self.state.position.copy_(state.position)
        for layer, source in zip(self.state.layers, state.layers, strict=True):
            for name, buffer in layer.items():
                buffer.copy_(source[name])
        self.feed(token)

    def seek(self, tokens: int) -> None:
        room = self.state.capacity - self.model.n_meta
        if not 0 <= tokens < room:
            raise UsageError(f"position {tokens} in a cache of {room} tokens", f"choose 0 to {room - 1}")
        self.state.position.fill_(tokens + self.model.n_meta)

    def position(self) -> int:
        return int(self.state.position.item()) - self.model.n_meta

    def step(self) -> None:
        self.logits.copy_(self.model.step(self.token, self.state))
        torch.argmax(self.logits, dim=-1, out=self.token)


def make_runtime(model: HybridLM, batch: int, tokens: int) -> Runtime:
    """What decodes on the model's device, with room for ``tokens`` tokens a sequence.

    On a GPU that is the captured chain of Triton kernels, on a CPU the model's own step.
    """
    if not model.embed_tokens.weight.is_cuda:
        return TorchRuntime(model, batch, tokens)
    from archsearch.model.decode import DecodeGraph

    return DecodeGraph(model, batch, tokens)
