"""Projections of one token a sequence, with norm and epilogue: what is computed, and which kernel computes it.

``project`` and ``head`` run the Triton kernels of ``gemv.py`` (one sequence) and ``gemm.py`` (several).
``project_reference`` and ``head_reference`` are their twins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two
from archsearch.model.kernels.gemm import gemm_kernel, gemm_shape
from archsearch.model.kernels.gemv import gemv_kernel, gemv_shape
from archsearch.model.kernels.narrow import MOST, narrow_kernel, narrow_shape


class Epilogue(IntEnum):
    """What happens to the product; the numbers are those that the kernels test."""

    PLAIN = 0
    GATED = 1
    RESIDUAL = 2
    LOGITS = 3


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMSNorm that a projection applies to its input.

    Attributes:
        eps: added to the mean square.
        gain: [K]; the mean square is then computed from the input itself.
        squares: [B, groups, parts] in fp32 instead of ``gain``: parts of the mean square of each of the equal
            groups of the input, summed here. The input has its gain already.
    """

    eps: float
    gain: Tensor | None = None
    squares: Tensor | None = None


def project(x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue = Epilogue.PLAIN, norm: Norm | None = None,
            bias: Tensor | None = None) -> None:  # fmt: skip
    """``out = epilogue(norm(x) @ weight.T + bias)``.

    Args:
        x: [B, K].
        weight: [N, K]; for ``GATED`` [2 N, K], the gate's rows before the others.
        out: [B, N], written; ``RESIDUAL`` adds to it.
        epilogue: PLAIN, GATED (``silu(gate) * up``) or RESIDUAL.
        norm: applied to ``x`` first.
        bias: [N].
    """
    _run(x, weight, out, epilogue, norm, bias, out, out)


def head(x: Tensor, weight: Tensor, logits: Tensor, best: Tensor, best_row: Tensor, norm: Norm) -> None:
    """Logits and, for each part of the vocabulary, the largest and where it is.

    Args:
        x: [B, K].
        weight: [V, K].
        logits: [B, V], written.
        best: [B, parts] in fp32, written; ``head_parts`` counts the parts.
        best_row: [B, parts] in int32, written: the row of ``best``, the first of equals.
        norm: applied to ``x`` first.
    """
    _run(x, weight, logits, Epilogue.LOGITS, norm, None, best, best_row)


def head_parts(batch: int, vocabulary: int, hidden: int) -> int:
    """Parts of the vocabulary that ``head`` reports the largest logit of."""
    if batch == 1:
        shape = gemv_shape(vocabulary, hidden, logits=True)
        return triton.cdiv(vocabulary, shape.rows * shape.steps)
    if batch <= MOST:
        return triton.cdiv(vocabulary, narrow_shape(batch, vocabulary, hidden).rows)
    return triton.cdiv(vocabulary, gemm_shape(batch, vocabulary, hidden).rows)


def _run(x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue, norm: Norm | None, bias: Tensor | None,
         best: Tensor, best_row: Tensor) -> None:  # fmt: skip
    (batch, k), n = x.shape, out.shape[1]
    squares = None if norm is None else norm.squares
    groups, parts = (1, 1) if squares is None else squares.shape[1:]
    gain = None if norm is None else norm.gain
    tensors = (x, x if gain is None else gain, x if squares is None else squares, weight,
               x if bias is None else bias, out, best, best_row)  # fmt: skip
    constants = {"K": k, "GROUP": k // groups, "PARTS": parts, "PARTS_BLOCK": power_of_two(parts),
                 "GAIN": gain is not None, "SQUARES": squares is not None, "BIAS": bias is not None,
                 "EPILOGUE": int(epilogue)}  # fmt: skip
    eps = 0.0 if norm is None else norm.eps
    if batch == 1:
        cut = gemv_shape(n, k, epilogue == Epilogue.GATED, epilogue == Epilogue.LOGITS, k // groups)
        grid = (triton.cdiv(n, cut.rows * cut.steps),)
        sizes = {"ROWS": cut.rows, "STEPS": cut.steps, "CHUNK": cut.chunk}
        launch(gemv_kernel, grid, x, *tensors, n, eps, **constants, **sizes, warps=cut.warps)
        return
    if batch <= MOST:
        held = narrow_shape(batch, n, k, k // groups, epilogue == Epilogue.GATED)
        sizes = {"ROWS": held.rows, "CHUNK": held.chunk, "DEPTH": held.depth, "BATCH_BLOCK": held.batch}
        launch(narrow_kernel, (triton.cdiv(n, held.rows),), x, *tensors, n, batch, eps, **constants, **sizes,
               warps=held.warps)  # fmt: skip
        return
    tile = gemm_shape(batch, n, k, k // groups)
    grid = (triton.cdiv(n, tile.rows), triton.cdiv(batch, tile.batch))
    sizes = {"ROWS": tile.rows, "CHUNK": tile.chunk, "BATCH_BLOCK": tile.batch}
    launch(gemm_kernel, grid, x, *tensors, n, batch, eps, **constants, **sizes, warps=tile.warps, stages=tile.stages)


def _normalized(x: Tensor, norm: Norm | None) -> Tensor:
    x = x.float()
    if norm is None:
        return x
    if norm.gain is not None:
        return F.rms_norm(x, x.shape[-1:], eps=norm.eps) * norm.gain.float()
    scale = torch.rsqrt(norm.squares.sum(-1) + norm.eps)
    return (x.unflatten(-1, (scale.shape[1], -1)) * scale[..., None]).flatten(-2)


def project_reference(x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue = Epilogue.PLAIN,
                      norm: Norm | None = None, bias: Tensor | None = None) -> None:  # fmt: skip
    """``project`` in plain torch, in fp32."""
    y = F.linear(_normalized(x, norm), weight.float(), None if bias is None else bias.float())
    if epilogue == Epilogue.GATED:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    out.copy_(out.float() + y if epilogue == Epilogue.RESIDUAL else y)


def head_reference(x: Tensor, weight: Tensor, logits: Tensor, best: Tensor, best_row: Tensor, norm: Norm) -> None:
    """``head`` in plain torch: the parts are even."""
    y = F.linear(_normalized(x, norm), weight.float())
    logits.copy_(y)
    y = logits.float()
    size = -(-y.shape[1] // best.shape[1])
    parts = F.pad(y, (0, size * best.shape[1] - y.shape[1]), value=-torch.inf).unflatten(-1, (-1, size))
    value, row = parts.max(-1)
    best.copy_(value)
    best_row.copy_(row + torch.arange(best.shape[1], device=y.device) * size)
