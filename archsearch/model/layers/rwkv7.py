"""RWKV-7: a memory whose transition is diagonal plus low-rank, behind a token shift."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from archsearch import operators
from archsearch.model import fla_ops
from archsearch.model.chunked import dplr_chunked
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.parts import l2_normalize, linear
from archsearch.model.recurrence import Mixed, accumulator, dplr_step

STRONGEST = -math.exp(-0.5)
"""Log decays lie between this and 0."""


class LowRank(nn.Module):
    """``up(activation(down(x)))``, its weights named as in flash-linear-attention."""

    def __init__(self, size: int, rank: int, activation: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(linear(size, rank), activation, linear(rank, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)

    def without_bias(self, x: Tensor) -> Tensor:
        """The same before the bias is added."""
        return F.linear(self.lora[1](self.lora[0](x)), self.lora[2].weight)


class RWKV7(Layer):
    """RWKV-7's time mixing (arXiv 2503.14456, section 4), its weights named as in flash-linear-attention.

    Each of six inputs is the token mixed with the one before it. With receptance r, log decay
    ``w = -e^-0.5 sigmoid(.)``, key k, removal key ``kk = normalize(k k_k)`` and rate ``a = sigmoid(.)``, the memory is
    ``S <- S (diag(e^w) - kk (kk a)^T) + v (k (1 + (a - 1) k_a))^T``; the output ``(GroupNorm(S r) + (r . k r_k) v) g``.
    There is no residual between the values of layers, as in the original's first layer.

    State: ``conv`` [B, 1, hidden], the last token's input, and ``recurrent`` [B, heads, V, K] in fp32.
    """

    residual: ClassVar[str] = "o_proj"
    internal: ClassVar[tuple[str, ...]] = ("w_lora.lora.2", "a_lora.lora.2", "g_lora.lora.2")
    paths: ClassVar[tuple[str, ...]] = ("torch", "fla")
    kernels: ClassVar[str] = "fla chunk_rwkv7"
    inputs: ClassVar[str] = "rwkvag"

    def __init__(self, config: operators.RWKV7, hidden_size: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_heads(hidden_size), config.head_dim
        self.norm_eps = norm_eps * config.head_dim
        # vectors all, even those of one row a head: weight decay is for matrices
        for name in (*(f"x_{name}" for name in self.inputs), "k_k", "k_a", "r_k"):
            self.register_parameter(name, nn.Parameter(torch.zeros(hidden_size)))
        self.r_proj = linear(hidden_size, hidden_size)
        self.k_proj = linear(hidden_size, hidden_size)
        self.v_proj = linear(hidden_size, hidden_size)
        self.o_proj = linear(hidden_size, hidden_size)
        decay, rate, gate = config.ranks(hidden_size)
        self.w_lora = LowRank(hidden_size, decay, nn.Tanh())
        self.a_lora = LowRank(hidden_size, rate, nn.Identity())
        self.g_lora = LowRank(hidden_size, gate, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.heads, hidden_size, self.norm_eps)

    def mix(self, r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor) -> Mixed:
        """Run the recurrence over whole sequences."""
        return dplr_chunked(r, k, v, a, b, decay)

    def allocate_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch, self.heads, self.head_dim, self.head_dim
        return {
            "conv": torch.zeros(batch, 1, self.heads * self.head_dim, device=device, dtype=dtype),
            "recurrent": torch.zeros(shape, device=device, dtype=accumulator(dtype)),
        }

    def sequence(self, x: Tensor, state: State | None) -> Tensor:
        parts, gate = self._parts(x, F.pad(x, (0, 0, 1, -1)))
        o, final = self.mix(*parts)
        self._keep(state, x, final)
        return self._output(o, parts, gate)

    def fused(self, x: Tensor, state: State | None) -> Tensor:
        from archsearch.model.fused.bonus import bonus
        from archsearch.model.fused.shift import token_shift
        from archsearch.model.fused.transition import transition

        x = fla_ops.half(x)
        r, w, k, v, a, g = token_shift(x, [self.get_parameter(f"x_{name}") for name in self.inputs])
        r, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.r_proj(r), self.v_proj(v)))
        w, a = self.w_lora.without_bias(w), self.a_lora.without_bias(a)
        scales = [self.k_k, self.k_a, self.w_lora.lora[2].bias, self.a_lora.lora[2].bias]
        k, removal, replaced, decay = transition(self.k_proj(k), w, a, scales, STRONGEST, self.heads)
        o, final = fla_ops.rwkv7(r, k, v, removal, replaced, decay, STRONGEST, keep=state is not None)
        self._keep(state, x, final)
        norm = [self.g_norm.weight, self.g_norm.bias, self.r_k]
        return fla_ops.project(bonus(o, r, k, v, self.g_lora(g), norm, self.norm_eps), self.o_proj)

    def step(self, x: Tensor, state: State, position: Tensor) -> Tensor:
        parts, gate = self._parts(x, state["conv"][:, 0].to(x.dtype))
        o, final = dplr_step(*parts, state["recurrent"])
        self._keep(state, x[:, None], final)
        return self._output(o, parts, gate)

    def _keep(self, state: State | None, x: Tensor, final: Tensor | None) -> None:
        if state is not None and final is not None:
            state["conv"].copy_(x[:, -1:])
            state["recurrent"].copy_(final)

    def _parts(self, x: Tensor, previous: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the recurrence takes, exactly and split into heads, and the output gate."""
        delta, exact = previous - x, accumulator(x.dtype)
        mixes = (self.get_parameter(f"x_{name}").to(x.dtype) for name in self.inputs)
        r, w, k, v, a, g = (torch.addcmul(x, delta, mix) for mix in mixes)
        r, k, v, gate = self.r_proj(r), self.k_proj(k), self.v_proj(v), self.g_lora(g)
        decay, rate = STRONGEST * self.w_lora(w).to(exact).sigmoid(), self.a_lora(a).to(exact).sigmoid()
        k = k.to(exact)
        removal = l2_normalize((k * self.k_k.to(exact)).unflatten(-1, (self.heads, -1))).to(exact)
        k = torch.addcmul(k, k * (rate - 1), self.k_a.to(exact))
        r, k, v, rate, decay = (t.unflatten(-1, (self.heads, -1)) for t in (r, k, v, rate, decay))
        return [r, k, v, -removal, removal * rate, decay], gate

    def _output(self, o: Tensor, parts: list[Tensor], gate: Tensor) -> Tensor:
        """Norm a head, the current token's bonus, gate, projection."""
        r, k, v = (t.to(o.dtype) for t in parts[:3])
        bonus = (r * k * self.r_k.to(o.dtype).unflatten(-1, (self.heads, -1))).sum(-1, keepdim=True) * v
        centred = F.layer_norm(o, (self.head_dim,), eps=self.norm_eps).flatten(-2)
        normed = torch.addcmul(self.g_norm.bias.to(o.dtype), centred, self.g_norm.weight.to(o.dtype))
        return self.o_proj(((normed + bonus.flatten(-2)) * gate.to(o.dtype)).to(gate.dtype))

    @torch.no_grad()
    def init_weights(self, generator: Generator | None, residual_std: float) -> None:
        """Biases and scales as published for a layer half-way up, since a layer does not know where it stands."""
        super().init_weights(generator, residual_std)
        hidden = self.heads * self.head_dim
        at = torch.arange(hidden, device=self.k_k.device, dtype=torch.float32) / (hidden - 1)
        zigzag = (torch.arange(hidden, device=at.device) % self.head_dim) * (2 / (self.head_dim - 1)) - 1
        zigzag = zigzag * zigzag.abs()
        for name, power in zip(self.inputs, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            self.get_parameter(f"x_{name}").copy_(1 - (at * (hidden - 1) / hidden) ** (power / 2))
        self.k_k.copy_(0.71 - 0.1 * (at - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for part in (self.w_lora, self.a_lora, self.g_lora):
            nn.init.zeros_(part.lora[0].weight)
            nn.init.normal_(part.lora[2].weight, std=0.1 * hidden**-0.5, generator=generator)
        self.w_lora.lora[2].bias.copy_(-6 + 6 * at ** (1 + 0.5**0.3) + 0.5 + 2.5 * zigzag)
        self.a_lora.lora[2].bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (at - 0.5))
        nn.init.ones_(self.g_norm.weight)
        nn.init.zeros_(self.g_norm.bias)
