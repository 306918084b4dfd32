"""The recurrences of the linear mixers, one token at a time: what every faster form is tested against.

``chunked.py`` gives the same numbers for whole sequences with a few large matrix products; ``stepwise`` runs a
step over a sequence.

Shapes: queries and keys ``[B, H, K]``, values and outputs ``[B, H, V]``, states ``[B, H, V, K]``. Decays are
logarithms, at most 0. Everything is computed in fp32 (or fp64, if that is what comes in), whatever autocast is in
force: products of decays and the triangular inverse do not survive bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    without ``decay``, Gated DeltaNet (arXiv 2412.06464) with one a head, Kimi Delta Attention
    (arXiv 2510.26692) with one a key channel.

    Args:
        q: [B, H, K], L2-normalised.
        k: [B, H, K], L2-normalised.
        v: [B, H, V].
        beta: [B, H], write strength in (0, 1).
        decay: [B, H], [B, H, K] or None.
        state: [B, H, V, K].
    """
    if decay is not None:
        state = state * (decay if decay.dim() == k.dim() else decay[..., None]).exp()[..., None, :]
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


@full_precision
def dplr_step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, state: Tensor) -> Mixed:
    """One step with a diagonal plus low-rank transition (RWKV-7, arXiv 2503.14456), unscaled.

    ``S <- S diag(exp(decay)) + (S a) b^T + v k^T; o = S q``; on the right ``S`` is the state before the step.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        a: [B, H, K], what is taken away is read with it.
        b: [B, H, K], and written back with it.
        decay: [B, H, K].
        state: [B, H, V, K].
    """
    removed = (state @ a[..., None]) * b[..., None, :]
    state = state * decay.exp()[..., None, :] + removed + v[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0], state


@full_precision
def selective_scan_step(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor, state: Tensor) -> Mixed:
    """One step of Mamba's selective state-space model (arXiv 2312.00752), without the skip ``D x``.

    ``S <- S exp(dt A) + dt x b^T; o = S c``: each channel has its own decays.

    Args:
        c: [B, N], shared by the channels.
        b: [B, N], likewise.
        x: [B, D].
        dt: [B, D].
        rate: [D, N], A (negative).
        state: [B, D, N].
    """
    state = state * (dt[..., None] * rate).exp() + (dt * x)[..., None] * b[:, None]
    return (state @ c[..., None])[..., 0], state


def stepwise(step: Callable[..., Mixed], *inputs: Tensor | None, state: Tensor) -> Mixed:
    """Run ``step`` token by token over ``inputs`` with time in dimension 1, from ``state``."""
    outputs = []
    length = next(x.shape[1] for x in inputs if x is not None)
    for t in range(length):
        output, state = step(*(None if x is None else x[:, t] for x in inputs), state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state
