"""One decode step of RWKV-7's recurrence in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, wait
from archsearch.model.kernels.low_rank import SIGMOID, TANH, apply_low_rank, load_low, load_low_rank


@dataclass(frozen=True, slots=True)
class TimeMix:
    """What RWKV-7 has besides its projections.

    Attributes:
        decay, rate, gate: [hidden, rank], the second halves of the low-rank projections.
        decay_bias, rate_bias: [hidden].
        removal, key: [hidden], k_k and k_a.
        bonus: [hidden], r_k.
        gain, shift: [hidden], of the output norm.
        strongest: log decays lie between this and 0.
        eps: of the output norm.
        starts: where r, k, v and the low-rank inputs of decay, rate and gate begin in the projected vector.
    """

    decay: Tensor
    rate: Tensor
    gate: Tensor
    decay_bias: Tensor
    rate_bias: Tensor
    removal: Tensor
    key: Tensor
    bonus: Tensor
    gain: Tensor
    shift: Tensor
    strongest: float
    eps: float
    starts: tuple[int, int, int, int, int, int]


@triton.jit
def load_part(start, at, inside):
    """Part of a vector in fp32, 0 outside."""
    return tl.load(start + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rwkv7_kernel(projected, decay_up, rate_up, gate_up, decay_bias, rate_bias, removal, key_rate, bonus, gain, shift,
                 state, mixed, strongest, eps, width, heads, r_at, k_at, v_at, w_at, a_at, g_at, D: tl.constexpr,
                 D_BLOCK: tl.constexpr, DECAY: tl.constexpr, RATE: tl.constexpr, GATE: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """One head of one sequence: the output norm needs all of it."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    offset = tl.arange(0, D_BLOCK)
    inside, at = offset < D, head * D + offset
    cell = state + (sequence * heads + head).to(tl.int64) * D * D + offset[:, None] * D + offset[None, :]
    square = inside[:, None] & inside[None, :]
    s = tl.load(cell, mask=square, other=0.0, cache_modifier=".cg")
    decays = load_low_rank(decay_up, at, inside, DECAY)
    rates = load_low_rank(rate_up, at, inside, RATE)
    gates = load_low_rank(gate_up, at, inside, GATE)
    decay, rate = load_part(decay_bias, at, inside), load_part(rate_bias, at, inside)
    own_removal, own_key = load_part(removal, at, inside), load_part(key_rate, at, inside)
    own_bonus, gains, shifts = load_part(bonus, at, inside), load_part(gain, at, inside), load_part(shift, at, inside)
    wait(PDL)

    x = projected + sequence * width
    r, k, v = load_part(x + r_at, at, inside), load_part(x + k_at, at, inside), load_part(x + v_at, at, inside)
    decay += apply_low_rank(decays, load_low(x + w_at, DECAY, TANH), D_BLOCK)
    decay = strongest * tl.sigmoid(decay)
    rate = tl.sigmoid(rate + apply_low_rank(rates, load_low(x + a_at, RATE), D_BLOCK))
    gate = apply_low_rank(gates, load_low(x + g_at, GATE, SIGMOID), D_BLOCK)
    removed = k * own_removal
    removed *= tl.rsqrt(tl.sum(removed * removed) + 1e-6)
    k *= 1.0 + (rate - 1.0) * own_key
    taken = tl.sum(s * removed[None, :], 1)
    s = s * tl.exp(decay)[None, :] - taken[:, None] * (removed * rate)[None, :] + v[:, None] * k[None, :]
    tl.store(cell, s, mask=square)
    o = tl.sum(s * r[None, :], 1)
    centred = tl.where(inside, o - tl.sum(o) / D, 0.0)
    o = centred * tl.rsqrt(tl.sum(centred * centred) / D + eps) * gains + shifts
    o = (o + tl.sum(r * k * own_bonus) * v) * gate
    tl.store(mixed + sequence * heads * D + at, o.to(mixed.dtype.element_ty), mask=inside)


def rwkv7_step(projected: Tensor, mix: TimeMix, state: Tensor, mixed: Tensor) -> None:
    """One step: decay, rate and gate, update of the state, read-out, norm, bonus, output gate.

    Args:
        projected: [B, width], the parts at ``mix.starts``.
        mix: the layer's vectors.
        state: [B, heads, D, D] in fp32, changed in place.
        mixed: [B, heads * D], written.
    """
    batch, heads, _, d = state.shape
    ranks = [up.shape[1] for up in (mix.decay, mix.rate, mix.gate)]
    sizes = {"width": projected.shape[1], "heads": heads, "D": d, "D_BLOCK": power_of_two(d)}
    sizes |= dict(zip(("r_at", "k_at", "v_at", "w_at", "a_at", "g_at"), mix.starts, strict=True))
    sizes |= dict(zip(("DECAY", "RATE", "GATE"), ranks, strict=True))
    launch(rwkv7_kernel, (heads, batch), state, projected, mix.decay, mix.rate, mix.gate, mix.decay_bias,
           mix.rate_bias, mix.removal, mix.key, mix.bonus, mix.gain, mix.shift, state, mixed, mix.strongest, mix.eps,
           **sizes, warps=8 if d <= 64 else 16)  # fmt: skip


def rwkv7_step_reference(projected: Tensor, mix: TimeMix, state: Tensor, mixed: Tensor) -> None:
    """``rwkv7_step`` in plain torch."""
    _, heads, _, d = state.shape
    ups = mix.decay.float(), mix.rate.float(), mix.gate.float()
    widths = [heads * d] * 3 + [up.shape[1] for up in ups]
    x = projected.float()
    r, k, v, w, a, g = (x[:, at : at + width] for at, width in zip(mix.starts, widths, strict=True))
    decay = mix.strongest * (F.linear(w.tanh(), ups[0]) + mix.decay_bias.float()).sigmoid()
    rate = (F.linear(a, ups[1]) + mix.rate_bias.float()).sigmoid()
    removed = (k * mix.removal.float()).unflatten(-1, (heads, -1))
    removed = removed * torch.rsqrt(removed.square().sum(-1, keepdim=True) + 1e-6)
    k = k * (1 + (rate - 1) * mix.key.float())
    bonus = (r * k * mix.bonus.float()).unflatten(-1, (heads, -1)).sum(-1, keepdim=True)
    r, k, v, decay, rate = (t.unflatten(-1, (heads, -1)) for t in (r, k, v, decay, rate))
    taken = (state @ removed[..., None]) * (removed * rate)[..., None, :]
    state.copy_(state * decay.exp()[..., None, :] - taken + v[..., None] * k[..., None, :])
    o = F.layer_norm((state @ r[..., None])[..., 0], (d,), eps=mix.eps).flatten(1)
    o = o * mix.gain.float() + mix.shift.float() + (bonus * v).flatten(1)
    mixed.copy_(o * F.linear(g.sigmoid(), ups[2]))
