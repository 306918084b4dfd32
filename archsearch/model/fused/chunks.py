"""How kernels of chunked recurrences find their way: a program a chunk and head, tokens as rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk, as in flash-linear-attention's kernels, which share its tensors."""

MAX_DIM = 128
"""Widest head that a program holds, on a GPU with this much shared memory; half as wide with less."""

SHARED_MEMORY = 2**17


def fits(k: Tensor, v: Tensor) -> bool:
    """Whether the kernels here can take heads like ``k`` [B, T, H, K] and ``v``: one holds a head, and offsets inside a
    sequence, also of a projection a few times as wide, hold in 32 bits.
    """
    dim = max(k.shape[-1], v.shape[-1])
    small = k.is_cuda and torch.cuda.get_device_properties(k.device).shared_memory_per_block_optin < SHARED_MEMORY
    return dim <= (MAX_DIM // 2 if small else MAX_DIM) and k.shape[1] * k.shape[2] * dim < 2**29


def grid(k: Tensor) -> tuple[int, int]:
    """A program for every chunk of every head of ``k`` [B, T, H, K]."""
    return triton.cdiv(k.shape[1], CHUNK), k.shape[0] * k.shape[2]


def sizes(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Heads, and the widths of keys and values with the powers of two that hold them."""
    dims = k.shape[-1], v.shape[-1]
    blocks = (max(16, triton.next_power_of_2(dim)) for dim in dims)
    return {"H": k.shape[2], **dict(zip("KV", dims, strict=True)), **dict(zip(("BK", "BV"), blocks, strict=True))}


def split(x: Tensor) -> Tensor:
    """[B, T, H, ...] to chunks [B, H, N, CHUNK, ...], filled up with zeros."""
    x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)


def join(x: Tensor, length: int) -> Tensor:
    """The inverse of ``split``."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


@triton.jit
def rows(base, token, end, stride, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``token`` (any shape) of ``D`` numbers as [..., BD]; zeros behind the ``end``."""
    lane = tl.arange(0, BD)
    for _ in tl.static_range(len(token.shape)):
        lane = tl.expand_dims(lane, 0)
    token = tl.expand_dims(token, -1)
    return tl.load(base + token * stride + lane, mask=(token < end) & (lane < D), other=0.0)


@triton.jit
def rates(logits, token, end, stride):
    """The sigmoid of the logits of tokens ``token`` (any shape); whatever behind the ``end``."""
    return tl.sigmoid(tl.load(logits + token * stride, mask=token < end, other=0.0).to(tl.float32))
