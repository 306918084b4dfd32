"""One decode step of gated linear attention (GLA) in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, silu, softplus, wait
from archsearch.model.kernels.convolution import Output, emit, padded


@dataclass(frozen=True, slots=True)
class Decay:
    """The second half of GLA's low-rank decay.

    Attributes:
        weight: [heads * K, rank].
        bias: [heads * K].
        normalizer: divides the log decay.
    """

    weight: Tensor
    bias: Tensor
    normalizer: float


@triton.jit
def gla_kernel(projected, up, up_bias, gain, state, mixed, squares, normalizer,
               width, heads, K: tl.constexpr, V: tl.constexpr, K_BLOCK: tl.constexpr,
               V_BLOCK: tl.constexpr, V_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """Gated linear attention. ``projected`` holds q, k, v, g and the decay's low-rank input."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key, value = tl.arange(0, K_BLOCK), part * V_BLOCK + tl.arange(0, V_BLOCK)
    rank = tl.arange(0, RANK_BLOCK)
    in_k, in_v = key < K, value < V
    cell = state + (sequence * heads + head).to(tl.int64) * V * K + value[:, None] * K + key[None, :]
    inside = in_v[:, None] & in_k[None, :]
    s = tl.load(cell, mask=inside, other=0.0, cache_modifier=".cg")
    in_up = in_k[:, None] & (rank[None, :] < RANK)
    ups = tl.load(up + (head * K + key[:, None]) * RANK + rank[None, :], mask=in_up, other=0.0).to(tl.float32)
    decay = tl.load(up_bias + head * K + key, mask=in_k, other=0.0).to(tl.float32)
    gains = tl.load(gain + value, mask=in_v, other=0.0).to(tl.float32)
    wait(PDL)

    x = projected + sequence * width
    low = tl.load(x + 2 * heads * (K + V) + rank, mask=rank < RANK, other=0.0).to(tl.float32)
    q = tl.load(x + head * K + key, mask=in_k, other=0.0).to(tl.float32) * (K**-0.5)
    k = tl.load(x + heads * K + head * K + key, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * heads * K + head * V + value, mask=in_v, other=0.0).to(tl.float32)
    g = tl.load(x + heads * (2 * K + V) + head * V + value, mask=in_v, other=0.0).to(tl.float32)
    decay += tl.sum(ups * low[None, :], 1)
    # log sigmoid(x) = -softplus(-x)
    s = s * tl.exp(-softplus(-decay) / normalizer)[None, :] + v[:, None] * k[None, :]
    tl.store(cell, s, mask=inside)
    o = tl.sum(s * q[None, :], 1)
    tl.store(squares + (sequence * heads + head) * tl.num_programs(0) + part, tl.sum(o * o) / V)
    address = mixed + (sequence * heads + head) * V_PADDED + value
    tl.store(address, (o * gains * silu(g)).to(mixed.dtype.element_ty), mask=value < V_PADDED)


def gla_step(projected: Tensor, decay: Decay, state: Tensor, output: Output) -> None:
    """One step: decay, update of the state, read-out, gain, output gate.

    Args:
        projected: [B, width], q, k, v, g and the decay's low-rank input side by side.
        decay: makes the log decay of each key channel.
        state: [B, heads, V, K] in fp32, changed in place.
        output: where the read-out goes.
    """
    batch, heads, v, k = state.shape
    rank = decay.weight.shape[1]
    rows = output.mixed.shape[1] // heads // output.squares.shape[2]
    sizes = {"width": projected.shape[1], "heads": heads, "K": k, "V": v, "K_BLOCK": power_of_two(k), "V_BLOCK": rows,
             "V_PADDED": padded(v), "RANK": rank, "RANK_BLOCK": power_of_two(rank)}  # fmt: skip
    launch(gla_kernel, (output.squares.shape[2], heads, batch), state, projected, decay.weight, decay.bias,
           output.gain, state, output.mixed, output.squares, decay.normalizer, **sizes, warps=4)  # fmt: skip


def gla_step_reference(projected: Tensor, decay: Decay, state: Tensor, output: Output) -> None:
    """``gla_step`` in plain torch."""
    _, heads, v, k = state.shape
    *parts, low = projected.float().split([heads * k, heads * k, heads * v, heads * v, decay.weight.shape[1]], dim=-1)
    q, key, value, gate = (t.unflatten(-1, (heads, -1)) for t in parts)
    log = F.logsigmoid(F.linear(low, decay.weight.float(), decay.bias.float())) / decay.normalizer
    kept = state * log.exp().unflatten(-1, (heads, -1))[..., None, :]
    state.copy_(kept + value[..., None] * key[..., None, :])
    emit(output, (state @ q[..., None])[..., 0] * k**-0.5, gate)
