"""The recurrences of the linear mixers: one step, and whole sequences in chunks.

Each recurrence comes as ``*_step``, which follows its definition for one token, and as
``*_chunked``, which gives the same numbers with a few large matrix products.
``stepwise`` runs a step over a sequence: it is the truth that the chunked form is tested against.

Shapes: queries and keys ``[B, T, H, K]``, values and outputs ``[B, T, H, V]``, states ``[B, H, V, K]``;
a step takes and gives the same without ``T``. Decays are logarithms, at most 0. Everything is computed
in fp32 (or fp64, if that is what comes in), whatever autocast is in force: products of decays and the
triangular inverse do not survive bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Tokens a chunk: enough for large products, and their cost quadratic in it stays small."""

Mixed = tuple[Tensor, Tensor]
"""Outputs, and the state after the last token."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that recurrences over inputs of ``dtype`` are computed and stored in."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(function: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """Run ``function`` on fp32 (or fp64) tensors with autocast off."""

    @functools.wraps(function)
    def run(*args: Tensor | None, **kwargs: Any) -> Mixed:
        cast = [arg if arg is None else arg.to(accumulator(arg.dtype)) for arg in args]
        kind = next(arg.device.type for arg in cast if arg is not None)
        if not torch.amp.is_autocast_available(kind):
            return function(*cast, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*cast, **kwargs)

    return run


@full_precision
def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor) -> Mixed:
    """One step of the delta rule: decay the memory, correct what it recalls for ``k``, read it with ``q``.

    ``S <- S exp(decay); S <- S + beta (v - S k) k^T; o = S q / sqrt(K)``: DeltaNet (arXiv 2406.06484)
    without ``decay``, Gated DeltaNet (arXiv 2412.06464) with it.

    Args:
        q: [B, H, K], L2-normalised.
        k: [B, H, K], L2-normalised.
        v: [B, H, V].
        beta: [B, H], write strength in (0, 1).
        decay: [B, H] or None.
        state: [B, H, V, K].
    """
    if decay is not None:
        state = state * decay.exp()[..., None, None]
    error = v - (state @ k[..., None])[..., 0]
    state = state + (beta[..., None] * error)[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0] * q.shape[-1] ** -0.5, state


@full_precision
def gla_step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Mixed:
    """One step of gated linear attention (arXiv 2312.06635), ``o = S q / sqrt(K)``.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        decay: [B, H, K], one for each key channel.
        state: [B, H, V, K].
    """
    state = state * decay.exp()[..., None, :] + v[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0] * q.shape[-1] ** -0.5, state


@full_precision
def ssd_step(c: Tensor, b: Tensor, x: Tensor, decay: Tensor, state: Tensor) -> Mixed:
    """One step of Mamba-2's state-space model (arXiv 2405.21060), ``o = S c``, without the skip ``D x``.

    Args:
        c: [B, G, K], shared by the heads of a group.
        b: [B, G, K], likewise.
        x: [B, H, V], already times dt.
        decay: [B, H], dt times A.
        state: [B, H, V, K].
    """
    repeats = x.shape[1] // b.shape[1]
    b, c = (t.repeat_interleave(repeats, dim=1) for t in (b, c))
    state = state * decay.exp()[..., None, None] + x[..., None] * b[..., None, :]
    return (state @ c[..., None])[..., 0], state


def stepwise(step: Callable[..., Mixed], *inputs: Tensor | None, state: Tensor) -> Mixed:
    """Run ``step`` token by token over ``inputs`` with time in dimension 1, from ``state``."""
    outputs = []
    length = next(x.shape[1] for x in inputs if x is not None)
    for t in range(length):
        output, state = step(*(None if x is None else x[:, t] for x in inputs), state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


@full_precision
def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None) -> Mixed:
    """The delta rule over sequences from an empty memory, in WY form (arXiv 2406.06484, 2412.06464).

    Inside a chunk the corrected values solve a unit lower triangular system; it is solved, not inverted by
    doubling, whose powers overflow when keys repeat.

    Args:
        q: [B, T, H, K], L2-normalised.
        k: [B, T, H, K], L2-normalised.
        v: [B, T, H, V].
        beta: [B, T, H].
        decay: [B, T, H] or None.
    """
    length, size = q.shape[1], _chunk_size(q.shape[1])
    q, k, v = (_chunks(t, size) for t in (q * q.shape[-1] ** -0.5, k, v))
    beta = _chunks(beta, size)[..., None]
    scores, overlap = (q @ k.mT).tril(), (k * beta) @ k.mT
    keys, to_end, whole = k * beta, k, None
    if decay is not None:
        total = _chunks(decay, size).cumsum(-1)[..., None]
        between = _decay_between(total)
        scores, overlap = scores * between, overlap * between
        keys, q = keys * total.exp(), q * total.exp()
        to_end = k * (total[..., -1:, :] - total).exp()
        whole = total[..., -1:, :].exp()
    solved = torch.linalg.solve_triangular(overlap, torch.cat([v * beta, keys], -1), upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    before, corrected, state = _correct(values, keys, to_end.mT, whole)
    return _join(q @ before + scores @ corrected, length), state.mT


def _correct(values: Tensor, keys: Tensor, to_end: Tensor, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the memory [B, H, K, V] over the chunks: the memories before each, the corrected values, the last one."""
    state = values.new_zeros(*values.shape[:2], keys.shape[-1], values.shape[-1])
    before, corrected = [], []
    for n in range(values.shape[2]):
        before.append(state)
        corrected.append(values[:, :, n] - keys[:, :, n] @ state)
        kept = state if whole is None else state * whole[:, :, n]
        state = kept + to_end[:, :, n] @ corrected[-1]
    return torch.stack(before, 2), torch.stack(corrected, 2), state


@full_precision
def gla_chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Mixed:
    """Gated linear attention over sequences from an empty memory (arXiv 2312.06635).

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        decay: [B, T, H, K].
    """
    length, size = q.shape[1], _chunk_size(q.shape[1])
    q, k, v, decay = (_chunks(t, size) for t in (q * q.shape[-1] ** -0.5, k, v, decay))
    total = decay.cumsum(-2)
    last = total[..., -1:, :]
    before, state = _carry((k * (last - total).exp()).mT @ v, last.exp().mT)
    return _join((q * total.exp()) @ before + _gla_within(q, k, v, total), length), state.mT


def _gla_within(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """What the tokens of a chunk read from each other, by halving the chunk.

    The later half reads the earlier one through decays measured from their border, which are at most 1
    on both sides: no decay, however strong, overflows. Then each half does the same.
    """
    output = (q * k).sum(-1, keepdim=True) * v
    width = q.shape[-2] // 2
    while width:
        (_, late_q), (early_k, _), (early_v, _), (early, late) = (_halves(t, width) for t in (q, k, v, total))
        border = early[..., -1:, :]
        read = (late_q * (late - border).exp()) @ (early_k * (border - early).exp()).mT @ early_v
        output = output + torch.stack([torch.zeros_like(read), read], -3).flatten(-4, -2)
        width //= 2
    return output


def _halves(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[..., size, D] in blocks of two halves: both as [..., blocks, width, D]."""
    early, late = x.unflatten(-2, (-1, 2, width)).unbind(-3)
    return early, late


@full_precision
def ssd_chunked(c: Tensor, b: Tensor, x: Tensor, decay: Tensor) -> Mixed:
    """Mamba-2's state-space model over sequences from an empty state (SSD, arXiv 2405.21060).

    The heads of a group share ``b`` and ``c``, so one product serves them all, side by side.

    Args:
        c: [B, T, G, K].
        b: [B, T, G, K].
        x: [B, T, H, V], already times dt.
        decay: [B, T, H].
    """
    length, size = x.shape[1], _chunk_size(x.shape[1])
    groups, heads = b.shape[2], x.shape[2] // b.shape[2]
    c, b = _chunks(c, size), _chunks(b, size)
    x = _chunks(x.unflatten(2, (groups, heads)), size)
    total = _chunks(decay.unflatten(2, (groups, heads)), size).cumsum(-2)
    last = total[..., -1:, :]
    weights = (c @ b.mT)[..., None, :, :] * _decay_between(total.mT[..., None])
    within = (weights @ x.transpose(-2, -3)).transpose(-2, -3)
    added = b.mT @ (x * (last - total).exp()[..., None]).flatten(-2)
    before, state = _carry(added, last.exp().repeat_interleave(x.shape[-1], -1))
    across = (c @ before).unflatten(-1, (heads, -1)) * total.exp()[..., None]
    state = state.unflatten(-1, (heads, -1)).movedim(2, -1).flatten(1, 2)
    return _join(within + across, length).flatten(2, 3), state


def _chunk_size(length: int) -> int:
    """``CHUNK``, or the smallest power of two that holds a shorter sequence."""
    return min(CHUNK, 1 << max(length - 1, 0).bit_length())


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] to [B, H, N, size, ...]; the padding of zeros writes nothing and decays nothing."""
    missing = -x.shape[1] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def _join(x: Tensor, length: int) -> Tensor:
    """[B, H, N, size, ...] to [B, T, H, ...], the inverse of ``_chunks``."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _decay_between(total: Tensor) -> Tensor:
    """exp(total_i - total_j) for j <= i and 0 above, from cumulated decays [..., size, 1]."""
    size = total.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    # masked before exp: above the diagonal the difference may overflow, and inf times 0 is no gradient
    return (total - total.mT).masked_fill(above, -torch.inf).exp()


def _carry(added: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``S <- kept_n S + added_n`` over the chunks n in dimension 2: the states before each, and the last one."""
    state = torch.zeros_like(added[:, :, 0])
    before = []
    for n in range(added.shape[2]):
        before.append(state)
        state = state * kept[:, :, n] + added[:, :, n]
    return torch.stack(before, 2), state
