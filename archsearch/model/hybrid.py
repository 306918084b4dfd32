"""HybridLM: the language model that an ``Architecture`` describes.

Parameter names: ``embed_tokens.weight``, ``meta_tokens`` (when there are some), ``layers.{i}.norm.weight``,
``layers.{i}.op.*`` (named by each kind in ``layers/``), ``norm.weight``, and ``lm_head.weight`` unless the
embedding is tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch.architecture import Architecture
from archsearch.errors import UsageError
from archsearch.model import fla_ops
from archsearch.model.layers import LAYERS, State
from archsearch.model.layers.parts import RMSNorm, linear
from archsearch.operators import OperatorConfig


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Everything that decoding remembers: static buffers that are only changed in place.

    Attributes:
        layers: the buffers of each layer.
        position: int64 [] on the device, tokens seen so far, meta tokens included.
        capacity: tokens that fit, meta tokens included.
        batch: number of sequences.
    """

    layers: list[State]
    position: Tensor
    capacity: int
    batch: int

    def zero_(self) -> DecodeState:
        """Forget everything; addresses stay, so captured graphs stay valid."""
        self.position.zero_()
        for layer in self.layers:
            for buffer in layer.values():
                buffer.zero_()
        return self

    @property
    def nbytes(self) -> int:
        """Memory of the layers' buffers."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.values())


class Residual(nn.Module):
    """``x + op(RMSNorm(x))``."""

    def __init__(self, config: OperatorConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.kind = config.kind
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.op = LAYERS[config.kind](config, hidden_size, norm_eps)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x + added``, and what the operator adds to it: the next layer's norm takes that sum in."""
        if added is not None and self.op.path != "torch" and x.dtype == added.dtype:
            x, normed = self.norm.after(x, added)
            return x, self.op(normed)
        x = x if added is None else x + added
        return x, self.op(self.normed(x))

    def normed(self, x: Tensor) -> Tensor:
        """The norm in front of the operator: in 16 bits by one kernel where the operator computes so."""
        return self.norm(x) if self.op.path == "torch" else self.norm.fused(x, dtype=fla_ops.half_dtype(x))

    def prefill(self, x: Tensor, state: State) -> Tensor:
        """``forward`` that leaves what it saw in ``state``."""
        return x + self.op.prefill(self.normed(x), state)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        """One token, [B, hidden]."""
        return x + self.op.step(self.norm(x), state, position)


class HybridLM(nn.Module):
    """Embedding, residual operators, final norm, head.

    Weights are drawn at construction; under ``torch.device("meta")`` nothing is drawn, and ``to_empty``
    then ``init_weights`` give the model its weights (``build_model`` does both).
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        hidden, eps = architecture.hidden_size, architecture.norm_eps
        self.embed_tokens = nn.Embedding(architecture.vocab_size, hidden)
        self.meta_tokens = nn.Parameter(torch.zeros(architecture.meta_tokens, hidden)) if self.n_meta else None
        self.layers = nn.ModuleList(Residual(operator, hidden, eps) for operator in architecture.operators)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = None if architecture.tie_embeddings else linear(hidden, architecture.vocab_size)
        if not self.embed_tokens.weight.is_meta:
            self.init_weights(0)

    @property
    def n_meta(self) -> int:
        """Number of meta tokens."""
        return self.architecture.meta_tokens

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights: normal with std 0.02, less for projections onto the residual stream, as GPT-2 does.

        The numbers depend on the seed, the device's kind and the data type.
        """
        generator = Generator(self.embed_tokens.weight.device).manual_seed(seed)
        nn.init.normal_(self.embed_tokens.weight, std=0.02, generator=generator)
        if self.meta_tokens is not None:
            nn.init.normal_(self.meta_tokens, std=0.02, generator=generator)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=0.02, generator=generator)
        nn.init.ones_(self.norm.weight)
        for layer in self.layers:
            nn.init.ones_(layer.norm.weight)
            layer.op.init_weights(generator, 0.02 * len(self.layers) ** -0.5)

    def paths(self) -> dict[str, str]:
        """Which implementation each kind of operator trains with."""
        return {layer.kind: layer.op.implementation + layer.op.caveat for layer in self.layers}

    def use(self, path: str) -> HybridLM:
        """Train every kind that has it through the implementation ``path``; the others keep the reference."""
        for layer in self.layers:
            if path in layer.op.paths:
                layer.op.path = path
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab] of the tokens that follow ``tokens`` [B, T]."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: [B, T, hidden] after the final norm, without the meta tokens.

        Under autocast the residual stream is of its type: what moves memory is most of a small model's step.
        """
        device, dtype = tokens.device.type, None
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, added = self._embed(tokens, dtype), None
        for layer in self.layers:
            x, added = layer(x, added)
        if self.layers[-1].op.path != "torch" and x.dtype == added.dtype:
            return self.norm.after(x, added)[1][:, self.n_meta :]
        return self.norm((x + added)[:, self.n_meta :])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head to what ``hidden`` returns."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the head, [vocab, hidden]; the embedding's own where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def allocate_state(
        self, batch: int, length: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DecodeState:
        """An empty state for ``batch`` sequences of ``length`` tokens; meta tokens come on top.

        Args:
            batch: number of sequences.
            length: tokens that each may hold.
            device: where; the model's own when absent.
            dtype: of caches (recurrent states are fp32 at least); the model's own when absent.
        """
        weight = self.embed_tokens.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        capacity = length + self.n_meta
        layers = [layer.op.allocate_state(batch, capacity, device, dtype) for layer in self.layers]
        return DecodeState(layers, torch.zeros((), dtype=torch.int64, device=device), capacity, batch)

    @torch.no_grad()
    def begin(self, state: DecodeState) -> DecodeState:
        """Start without a prompt: empty the state and run the meta tokens into it."""
        state.zero_()
        if self.meta_tokens is not None:
            self._prefill(self.meta_tokens.expand(state.batch, -1, -1), state)
        return state

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Start with a prompt [B, T], T >= 1: logits [B, vocab] of the token that follows it.

        Raises:
            UsageError: no tokens, or more than the state holds.
        """
        length = tokens.shape[1]
        if not 1 <= length <= state.capacity - self.n_meta:
            room = state.capacity - self.n_meta
            raise UsageError(f"a prompt of {length} tokens in a state of {room}", f"give 1 to {room} tokens")
        state.zero_()
        x = self._prefill(self._embed(tokens), state)
        return self.logits(self.norm(x[:, -1]))

    @torch.no_grad()
    def step(self, token: Tensor, state: DecodeState) -> Tensor:
        """One token a sequence, [B]: logits [B, vocab] of the next one. ``state`` moves on in place.

        Nothing waits for the device, so nothing can refuse a step past the capacity: it stays inside the
        buffers, and its logits mean nothing. Who counts the steps must stop in time.
        """
        x = self.embed_tokens(token)
        for layer, buffers in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, buffers, state.position)
        state.position.add_(1)
        return self.logits(self.norm(x))

    def _embed(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Embedded tokens behind the meta tokens, [B, meta + T, hidden]; in ``dtype``, or that of the weights."""
        # the matrix is cast rather than what is read from it, which is more in a batch of a training
        x = F.embedding(tokens, self.embed_tokens.weight.to(dtype or self.embed_tokens.weight.dtype))
        if self.meta_tokens is None:
            return x
        return torch.cat([self.meta_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def _prefill(self, x: Tensor, state: DecodeState) -> Tensor:
        for layer, buffers in zip(self.layers, state.layers, strict=True):
            x = layer.prefill(x, buffers)
        state.position.fill_(x.shape[1])
        return x


def build_model(
    architecture: Architecture, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> HybridLM:
    """A model with weights drawn on ``device`` from ``seed``, in ``dtype``; no copy is made on the way."""
    with torch.device("meta"):
        model = HybridLM(architecture).to(dtype)
    model.to_empty(device=device)
    model.init_weights(seed)
    return model
