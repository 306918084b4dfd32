"""The recurrences of the linear mixers over whole sequences, in chunks: a few large matrix products.

Each gives what its ``*_step`` in ``recurrence.py`` gives token by token, from an empty state. Shapes: as there, with
time in dimension 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.recurrence import Mixed, full_precision

CHUNK = 64
"""Tokens a chunk: enough for large products, and their cost quadratic in it stays small."""


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
        decay: [B, T, H], [B, T, H, K] or None.
    """
    length, size = q.shape[1], _chunk_size(q.shape[1])
    channelwise = decay is not None and decay.dim() == k.dim()
    q, k, v = (_chunks(t, size) for t in (q * q.shape[-1] ** -0.5, k, v))
    beta = _chunks(beta, size)[..., None]
    keys, to_end, whole = k * beta, k, None
    if channelwise:
        total = _chunks(decay, size).cumsum(-2)
        scores, overlap = _decayed_scores(q, k, total, total), _decayed_scores(keys, k, total, total)
    else:
        scores, overlap = (q @ k.mT).tril(), keys @ k.mT
    if decay is not None:
        if not channelwise:
            total = _chunks(decay, size).cumsum(-1)[..., None]
            between = _decay_between(total)
            scores, overlap = scores * between, overlap * between
        keys, q = keys * total.exp(), q * total.exp()
        to_end = k * (total[..., -1:, :] - total).exp()
        whole = total[..., -1:, :].exp().mT
    solved = torch.linalg.solve_triangular(overlap, torch.cat([v * beta, keys], -1), upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    before, corrected, state = _correct(values, keys, to_end.mT, whole)
    return _join(q @ before + scores @ corrected, length), state.mT


def _correct(
    values: Tensor, keys: Tensor, to_end: Tensor, whole: Tensor | None, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the memory [B, H, K, V] over the chunks: the memories before each, the corrected values, the last one.

    ``added`` [B, H, N, K, V] is what each chunk writes besides its corrected values.
    """
    state = values.new_zeros(*values.shape[:2], keys.shape[-1], values.shape[-1])
    before, corrected = [], []
    for n in range(values.shape[2]):
        before.append(state)
        corrected.append(values[:, :, n] - keys[:, :, n] @ state)
        kept = state if whole is None else state * whole[:, :, n]
        state = kept + to_end[:, :, n] @ corrected[-1]
        state = state if added is None else state + added[:, :, n]
    return torch.stack(before, 2), torch.stack(corrected, 2), state


@full_precision
def dplr_chunked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor) -> Mixed:
    """The diagonal plus low-rank recurrence over sequences from an empty memory (arXiv 2503.14456), as ``dplr_step``.

    What ``a`` reads at each token, ``u = S a``, solves a unit lower triangular system inside a chunk.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        a: [B, T, H, K].
        b: [B, T, H, K].
        decay: [B, T, H, K].
    """
    length, size = q.shape[1], _chunk_size(q.shape[1])
    q, k, v, a, b, decay = (_chunks(t, size) for t in (q, k, v, a, b, decay))
    total = decay.cumsum(-2)
    # ``a`` reads the memory as it is before its own token decays it
    earlier, last = F.pad(total[..., :-1, :], (0, 0, 1, 0)), total[..., -1:, :]
    written = torch.stack([b, k])
    overlap, read = _decayed_scores(a, written, earlier, total).tril(-1)
    right = torch.cat([read @ v, -a * earlier.exp()], -1)
    solved = torch.linalg.solve_triangular(-overlap, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    to_end = (last - total).exp()
    before, removed, state = _correct(values, keys, (b * to_end).mT, last.exp().mT, (k * to_end).mT @ v)
    within = (_decayed_scores(q, written, total, total) @ torch.stack([removed, v])).sum(0)
    return _join((q * total.exp()) @ before + within, length), state.mT


def _decayed_scores(q: Tensor, k: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
    """``sum_c q_ic k_jc exp(reads_ic - writes_jc)`` for j <= i and 0 above, from [..., size, K], by doubling.

    The later half of a block reads the earlier one through decays measured from their border, which are at most 1
    on both sides: no decay, however strong, overflows. The diagonal is ``q_i k_i``, whatever ``reads``.
    """
    scores = (q * k).sum(-1)[..., None, None]
    while scores.shape[-3] > 1:
        width = scores.shape[-1]
        (_, late_q), (early_k, _), (_, late), (early, _) = (_halves(t, width) for t in (q, k, reads, writes))
        border = early[..., -1:, :]
        below = (late_q * (late - border).exp()) @ (early_k * (border - early).exp()).mT
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        scores = torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)
    return scores.squeeze(-3)


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
    return _join((q * total.exp()) @ before + _decayed_scores(q, k, total, total) @ v, length), state.mT


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


SCAN = 16
"""Tokens a chunk of ``selective_scan_chunked``."""


@full_precision
def selective_scan_chunked(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor) -> Mixed:
    """Mamba's selective state-space model over sequences from an empty state (arXiv 2312.00752).

    Every channel has its own decays, so there are no large products. All chunks are stepped through at once, twice:
    from an empty state, for what each adds to the state, and then from the state before each.

    Args:
        c: [B, T, N].
        b: [B, T, N].
        x: [B, T, D].
        dt: [B, T, D].
        rate: [D, N], A (negative).
    """
    length = x.shape[1]
    c, b, x, dt = (_scan_chunks(t) for t in (c, b, x, dt))
    kept = [(step[..., None] * rate).exp() for step in dt]
    added = [(value * step)[..., None] * write[..., None, :] for value, step, write in zip(x, dt, b, strict=True)]
    state = torch.zeros_like(added[0])
    for new, old in zip(added, kept, strict=True):
        state = torch.addcmul(new, state, old)
    whole = (torch.stack(dt).sum(0)[..., None] * rate).exp()
    before, last = _carry(state[:, None], whole[:, None])
    state, output = before[:, 0], []
    for new, old, read in zip(added, kept, c, strict=True):
        state = torch.addcmul(new, state, old)
        output.append((state @ read[..., None])[..., 0])
    return torch.stack(output, 2).flatten(1, 2)[:, :length], last[:, 0]


def _scan_chunks(x: Tensor) -> tuple[Tensor, ...]:
    """[B, T, D] to SCAN tokens [B, chunks, D], padded with zeros, which change nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % SCAN)).unflatten(1, (-1, SCAN)).unbind(2)


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
