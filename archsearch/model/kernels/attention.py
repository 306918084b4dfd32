"""One decode step of softmax attention: norm and rotation of q and k, storing, split-KV attention, combination.

The stored tokens are cut into splits whose length follows the *actual* position, read on the device, so the cost
of a step follows it too, whatever the capacity. Query heads that share a KV head find its keys and values in the L2;
in long caches and larger batches two of them are handled together. The last split to finish combines all. Plain
arithmetic, not the tensor cores: one query a head leaves them idle, and without them the kernel needs next to no
shared memory, so that it can start beside the one before it.

The current token is taken from registers by split 0, which also stores it: no program reads the slot that another
one writes. Slots beyond the stored tokens may hold anything, NaN included: they are never loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import LOG2E, launch, power_of_two
from archsearch.model.kernels.split_attention import attend_kernel

LONG = 16384
"""Tokens of a cache above which two query heads share a program."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes and constants of an attention operator.

    Attributes:
        query, kv: numbers of heads.
        dim: head dim.
        eps: of the norms of queries and keys.
        ring: whether slots are reused (position modulo slots).
    """

    query: int
    kv: int
    dim: int
    eps: float
    ring: bool

    @property
    def share(self) -> int:
        """Query heads that share a kv head."""
        return self.query // self.kv


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut.

    Attributes:
        group: query heads a program, a power of two.
        block: tokens a tile.
        unroll: tiles a step.
        splits: at most so many, a power of two.
        tokens: at least so many a split.
        warps: of a program.
    """

    group: int
    block: int
    unroll: int
    splits: int
    tokens: int
    warps: int


def attention_shape(batch: int, heads: Heads, slots: int) -> Tile:
    """The cut for ``slots`` stored tokens: two programs for each of the 132 processors of a GPU.

    A query head a program is fastest while its keys and values come from the L2 for the others that share them.
    """
    group, warps, tokens = 1 if batch == 1 and slots <= LONG else min(2, heads.share), 4, 128
    # sixteen bytes a thread and tile: its 8 channels of one token
    block = max(4, warps * 32 * 8 // power_of_two(heads.dim))
    wanted = power_of_two(max(1, 256 // (batch * heads.kv * -(-heads.share // group))))
    return Tile(
        group,
        block,
        min(8, max(1, 64 // block)),
        max(1, min(wanted, 64, power_of_two(-(-slots // tokens)))),
        tokens,
        warps,
    )


def attend(projected: Tensor, norms: tuple[Tensor, Tensor] | None, rotary: Tensor, position: Tensor,
           keys: Tensor, values: Tensor, scratch: dict[str, Tensor], out: Tensor, heads: Heads) -> None:  # fmt: skip
    """Attention of the current token to those stored and to itself; stores its key and value.

    Args:
        projected: [B, (query + 2 kv) * dim], queries, keys and values side by side.
        norms: gains [dim] of the norms of queries and keys, or None.
        rotary: [positions, dim] in fp32, from ``rotary_table``.
        position: [] in int64, tokens before this one.
        keys: [B, kv, slots, dim], changed in place.
        values: like ``keys``.
        scratch: from ``attention_scratch``; its ``arrivals`` are 0 and are left so.
        out: [B, query * dim], written.
        heads: the sizes.
    """
    batch, slots = len(projected), keys.shape[2]
    tile = attention_shape(batch, heads, slots)
    groups = -(-heads.share // tile.group)
    q_gain, k_gain = norms or (rotary, rotary)
    dim_block = max(16, power_of_two(heads.dim))
    sizes = {"DIM": heads.dim, "DIM_BLOCK": dim_block, "GROUP": tile.group, "BLOCK": tile.block, "UNROLL": tile.unroll,
             "SPLITS": tile.splits, "TOKENS": tile.tokens, "NORM": norms is not None, "RING": heads.ring}  # fmt: skip
    launch(attend_kernel, (tile.splits, heads.kv * groups, batch), projected, projected, q_gain, k_gain, rotary,
           position, keys, values, scratch["partial"], scratch["tops"], scratch["weights"], scratch["arrivals"], out,
           slots, len(rotary), heads.dim**-0.5 * LOG2E, heads.eps, projected.shape[1], heads.query, heads.kv, groups,
           **sizes, warps=tile.warps)  # fmt: skip


def attention_scratch(batch: int, heads: Heads, slots: int, device: torch.device) -> dict[str, Tensor]:
    """What the splits of one step tell each other: ``partial`` sums, ``tops``, ``weights``, ``arrivals``."""
    tile = attention_shape(batch, heads, slots)
    pairs = heads.kv * -(-heads.share // tile.group)
    shape = batch, pairs, tile.splits, tile.group
    return {
        "partial": torch.empty(*shape, heads.dim, device=device),
        "tops": torch.empty(shape, device=device),
        "weights": torch.empty(shape, device=device),
        "arrivals": torch.zeros(batch, pairs, dtype=torch.int32, device=device),
    }


def rotary_table(positions: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864) for each position, [positions, dim] in fp32."""
    frequencies = theta ** -(torch.arange(dim // 2, device=device, dtype=torch.float32) / (dim // 2))
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _rotated(x: Tensor, gain: Tensor | None, turn: Tensor, eps: float) -> Tensor:
    if gain is not None:
        x = (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * gain.float()).to(x.dtype)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = turn.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attend_reference(projected: Tensor, norms: tuple[Tensor, Tensor] | None, rotary: Tensor, position: Tensor,
                     keys: Tensor, values: Tensor, scratch: dict[str, Tensor], out: Tensor,
                     heads: Heads) -> None:  # fmt: skip
    """``attend`` in plain torch; ``scratch`` is not used."""
    x = projected.unflatten(-1, (-1, heads.dim))
    q, k, v = x.split([heads.query, heads.kv, heads.kv], dim=1)
    q_gain, k_gain = norms or (None, None)
    turn = rotary[position.clamp(max=len(rotary) - 1)]
    q, k = _rotated(q, q_gain, turn, heads.eps), _rotated(k, k_gain, turn, heads.eps)
    slots = keys.shape[2]
    slot = position % slots if heads.ring else position.clamp(max=slots - 1)
    keys.index_copy_(2, slot[None], k[:, :, None].to(keys.dtype))
    values.index_copy_(2, slot[None], v[:, :, None].to(values.dtype))
    seen = torch.arange(slots, device=q.device) <= position
    k, v = (cache.masked_fill(~seen[:, None], 0).to(q.dtype) for cache in (keys, values))
    o = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[None], enable_gqa=True)
    out.copy_(o.flatten(1))
