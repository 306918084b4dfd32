"""The kernel of ``attention.py``."""

# Triton adds tuples, it does not unpack them.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from archsearch.model.kernels.common import wait

NOTHING = tl.constexpr(-1.0e30)
"""Stands for minus infinity where a difference of two must not be NaN."""

GRANULE = tl.constexpr(16)
"""Splits are cut at multiples of this many tokens."""


@triton.jit
def turn(gain, offset, partner, cos, sin, DIM: tl.constexpr, NORM: tl.constexpr):
    """What a head's own and its partner channels are multiplied with: the gain of its norm, and the rotation."""
    if NORM:
        real = offset < DIM
        cos *= tl.load(gain + offset, mask=real, other=0.0).to(tl.float32)
        sin *= tl.load(gain + partner, mask=real, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def turned(own, other, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """A head, the same in each row, normed and rotated, in fp32."""
    own, other = own.to(tl.float32), other.to(tl.float32)
    y = own * cos + other * sin
    if NORM:
        y *= tl.rsqrt(tl.sum(own * own, 1) / DIM + eps)[:, None]
    return y


@triton.jit
def load_tokens(cache, first, high, slot, row, offset, DIM: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Tokens ``first`` onwards as a tuple of tiles [BLOCK, dim]; 0 from ``high`` on and in ``slot``."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        token = first + i * BLOCK + row[:, None]
        inside = (token < high) & (token != slot) & (offset < DIM)
        tiles = tiles + (tl.load(cache + token * DIM + offset, mask=inside, other=0.0, cache_modifier=".cg"),)
    return tiles


@triton.jit
def absorb(queries, k, v, valid, tops, sums, totals):
    """Take tiles of keys and values [BLOCK, dim] into the running softmax of each query and each of the BLOCK rows.

    A row's maximum, sum and weighted values stay in the row's threads, so no warp waits for another here.
    """
    new_tops, new_sums, new_totals = (), (), ()
    for i in tl.static_range(len(queries)):
        scores = ()
        higher = tops[i]
        for j in tl.static_range(len(k)):
            score = tl.where(valid[j], tl.sum(k[j].to(tl.float32) * queries[i], 1), NOTHING)
            higher = tl.maximum(higher, score)
            scores = scores + (score,)
        fade = tl.exp2(tops[i] - higher)
        weight, total = sums[i] * fade, totals[i] * fade[:, None]
        for j in tl.static_range(len(k)):
            p = tl.where(valid[j], tl.exp2(scores[j] - higher), 0.0)
            weight += p
            total += p[:, None] * v[j].to(tl.float32)
        new_tops, new_sums, new_totals = new_tops + (higher,), new_sums + (weight,), new_totals + (total,)
    return new_tops, new_sums, new_totals


@triton.jit
def combine(partial, tops, weights, first, splits, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
            SPLITS: tl.constexpr):  # fmt: skip
    """The ``splits`` from ``first`` together, a tuple of GROUP heads [DIM_BLOCK]. Reads around the L1: others wrote.

    All is asked for before anything is used: what a chain of loads costs here, every step pays.
    """
    part, offset = tl.arange(0, SPLITS)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
    valid = part < splits
    tiles, highs, sums, heads = (), (), (), ()
    for i in tl.static_range(GROUP):
        row = (first + part) * GROUP + i
        tile = tl.load(partial + row * DIM + offset, mask=valid & (offset < DIM), other=0.0, cache_modifier=".cg")
        tiles = tiles + (tile,)
        highs = highs + (tl.load(tops + row, mask=valid, other=NOTHING, cache_modifier=".cg"),)
        sums = sums + (tl.load(weights + row, mask=valid, other=0.0, cache_modifier=".cg"),)
    for i in tl.static_range(GROUP):
        fade = tl.exp2(highs[i] - tl.max(highs[i], 0)[None, :])
        heads = heads + (tl.sum(tiles[i] * fade, 0) / tl.sum(sums[i] * fade, 0),)
    return heads


@triton.jit
def attend_kernel(projected, q_gain, k_gain, rotary, position, keys, values, partial, tops, weights, arrivals, out,
                  slots, positions, scale, eps, width, query, kv, groups, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, SPLITS: tl.constexpr,
                  TOKENS: tl.constexpr, NORM: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One split of one KV head of one sequence, for GROUP of the query heads that share it."""
    split, group, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, share = group // groups, query // kv
    row = tl.arange(0, BLOCK)
    # all rows alike, so that every tile has the same layout and nothing is exchanged between threads
    offset = tl.broadcast_to(tl.arange(0, DIM_BLOCK)[None, :], [BLOCK, DIM_BLOCK])
    partner = (offset + DIM // 2) % DIM
    real = offset < DIM
    here = tl.load(position, cache_modifier=".cg")
    slot = (here % slots if RING else tl.minimum(here, slots - 1)).to(tl.int32)
    stored = tl.minimum(here, slots).to(tl.int32)
    splits = tl.minimum(tl.maximum(tl.cdiv(stored, TOKENS), 1), SPLITS)
    if split >= splits:
        return
    length = tl.cdiv(tl.cdiv(stored, splits), GRANULE) * GRANULE
    low = split * length
    high = tl.minimum(low + length, stored)
    own_keys = keys + (sequence * kv + head).to(tl.int64) * slots * DIM
    own_values = values + (sequence * kv + head).to(tl.int64) * slots * DIM
    k = load_tokens(own_keys, low, high, slot, row, offset, DIM, BLOCK, UNROLL)
    v = load_tokens(own_values, low, high, slot, row, offset, DIM, BLOCK, UNROLL)
    angle = rotary + tl.minimum(here, positions - 1) * DIM + offset % (DIM // 2)
    cos = tl.load(angle, mask=real, other=0.0)
    sin = tl.load(angle + DIM // 2, mask=real, other=0.0) * tl.where(offset < DIM // 2, -1.0, 1.0)
    q_cos, q_sin = turn(q_gain, offset, partner, cos, sin, DIM, NORM)
    k_cos, k_sin = turn(k_gain, offset, partner, cos, sin, DIM, NORM)
    wait(PDL)

    start = projected + sequence * width
    own = tl.load(start + (query + head) * DIM + offset, mask=real, other=0.0)
    other = tl.load(start + (query + head) * DIM + partner, mask=real, other=0.0)
    new_v = tl.load(start + (query + kv + head) * DIM + offset, mask=real, other=0.0).to(values.dtype.element_ty)
    owns, others = (), ()
    for i in tl.static_range(GROUP):
        # a head beyond those that share this KV head computes the last one again
        q_at = (head * share + tl.minimum(group % groups * GROUP + i, share - 1)) * DIM
        owns = owns + (tl.load(start + q_at + offset, mask=real, other=0.0),)
        others = others + (tl.load(start + q_at + partner, mask=real, other=0.0),)
    new_k = turned(own, other, k_cos, k_sin, eps, DIM, NORM).to(keys.dtype.element_ty)
    queries, highest, sums, totals = (), (), (), ()
    for i in tl.static_range(GROUP):
        queries = queries + (turned(owns[i], others[i], q_cos, q_sin, eps, DIM, NORM) * scale,)
        highest = highest + (tl.full([BLOCK], NOTHING, tl.float32),)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
        totals = totals + (tl.zeros([BLOCK, DIM_BLOCK], tl.float32),)
    only = ((row == 0) & (split == 0),)
    highest, sums, totals = absorb(queries, (new_k,), (new_v,), only, highest, sums, totals)
    for begin in tl.range(low, high, UNROLL * BLOCK):
        # the next tokens are on their way while these are worked on
        later = begin + UNROLL * BLOCK
        next_k = load_tokens(own_keys, later, high, slot, row, offset, DIM, BLOCK, UNROLL)
        next_v = load_tokens(own_values, later, high, slot, row, offset, DIM, BLOCK, UNROLL)
        valid = ()
        for i in tl.static_range(UNROLL):
            token = begin + i * BLOCK + row
            valid = valid + ((token < high) & (token != slot),)
        highest, sums, totals = absorb(queries, k, v, valid, highest, sums, totals)
        k, v = next_k, next_v
    first = (row == 0)[:, None] & real & (split == 0) & (group % groups == 0)
    tl.store(own_keys + slot * DIM + offset, new_k, mask=first)
    tl.store(own_values + slot * DIM + offset, new_v, mask=first)

    pair = sequence * kv * groups + group
    column = tl.arange(0, DIM_BLOCK)
    target = out + (sequence * query + head * share + group % groups * GROUP) * DIM
    for i in tl.static_range(GROUP):
        top = tl.max(highest[i], 0)
        fade = tl.exp2(highest[i] - top)
        weight = tl.sum(sums[i] * fade, 0)
        total = tl.sum(totals[i] * fade[:, None], 0)
        if splits == 1:
            mine = (column < DIM) & (group % groups * GROUP + i < share)
            tl.store(target + i * DIM + column, (total / weight).to(out.dtype.element_ty), mask=mine)
        else:
            at = (pair * SPLITS + split) * GROUP + i
            tl.store(tops + at, top)
            tl.store(weights + at, weight)
            tl.store(partial + at * DIM + column, total, mask=column < DIM)
    if splits > 1:
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == splits - 1:
            heads = combine(partial, tops, weights, pair * SPLITS, splits, GROUP, DIM, DIM_BLOCK, SPLITS)
            for i in tl.static_range(GROUP):
                mine = (column < DIM) & (group % groups * GROUP + i < share)
                tl.store(target + i * DIM + column, heads[i].to(out.dtype.element_ty), mask=mine)
            tl.store(arrivals + pair, 0)
