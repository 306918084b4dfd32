"""One decode step of HGRN2 in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two, silu, wait
from archsearch.model.kernels.convolution import Output, padded


@triton.jit
def hgrn2_kernel(projected, gain, state, mixed, squares, width, heads, K: tl.constexpr, V: tl.constexpr,
                 K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, V_PADDED: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """HGRN2. ``projected`` holds q, the forget gate and v."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key, value = tl.arange(0, K_BLOCK), part * V_BLOCK + tl.arange(0, V_BLOCK)
    in_k, in_v = key < K, value < V
    cell = state + (sequence * heads + head).to(tl.int64) * V * K + value[:, None] * K + key[None, :]
    inside = in_v[:, None] & in_k[None, :]
    s = tl.load(cell, mask=inside, other=0.0, cache_modifier=".cg")
    gains = tl.load(gain + head * V + value, mask=in_v, other=0.0).to(tl.float32)
    wait(PDL)

    x = projected + sequence * width
    q = silu(tl.load(x + head * K + key, mask=in_k, other=0.0).to(tl.float32)) * (K**-0.5)
    forget = tl.load(x + heads * K + head * K + key, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * heads * K + head * V + value, mask=in_v, other=0.0).to(tl.float32)
    s = s * tl.sigmoid(forget)[None, :] + v[:, None] * tl.sigmoid(-forget)[None, :]
    tl.store(cell, s, mask=inside)
    o = tl.sum(s * q[None, :], 1)
    tl.store(squares + (sequence * heads + head) * tl.num_programs(0) + part, tl.sum(o * o) / (heads * V))
    address = mixed + (sequence * heads + head) * V_PADDED + value
    tl.store(address, (o * gains).to(mixed.dtype.element_ty), mask=value < V_PADDED)


def hgrn2_step(projected: Tensor, state: Tensor, output: Output) -> None:
    """One step: decay, update of the state, read-out, gain.

    Args:
        projected: [B, width], q, the forget gate's logits and v side by side.
        state: [B, heads, V, K] in fp32, changed in place.
        output: where the read-out goes; its norm is over all heads.
    """
    batch, heads, v, k = state.shape
    parts = output.squares.shape[2] // heads
    sizes = {"width": projected.shape[1], "heads": heads, "K": k, "V": v, "K_BLOCK": power_of_two(k),
             "V_BLOCK": output.mixed.shape[1] // heads // parts, "V_PADDED": padded(v)}  # fmt: skip
    launch(hgrn2_kernel, (parts, heads, batch), state, projected, output.gain, state, output.mixed,
           output.squares, **sizes, warps=4)  # fmt: skip


def hgrn2_step_reference(projected: Tensor, state: Tensor, output: Output) -> None:
    """``hgrn2_step`` in plain torch."""
    _, heads, v, k = state.shape
    q, forget, value = projected.float().split([heads * k, heads * k, heads * v], dim=-1)
    q, forget, value = (t.unflatten(-1, (heads, -1)) for t in (F.silu(q), forget.sigmoid(), value))
    state.copy_(state * forget[..., None, :] + value[..., None] * (1 - forget)[..., None, :])
    o = (state @ q[..., None])[..., 0] * k**-0.5
    output.squares.zero_()
    output.squares[:, 0, 0] = o.square().mean((1, 2))
    gained = (o.flatten(1) * output.gain.float()).unflatten(1, (heads, -1))
    output.mixed.copy_(F.pad(gained, (0, output.mixed.shape[1] // heads - v)).flatten(1))
