"""Projections of one token a sequence, with norm and epilogue: what is computed, and which kernel computes it.

``project`` and ``head`` run the Triton kernel of ``gemv.py`` (one sequence) or cuBLAS between those of ``gemm.py``.
``project_reference`` and ``head_reference`` are their twins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.kernels.common import launch, power_of_two
from archsearch.model.kernels.gemm import LOGIT_BLOCK, gate, largest, normalize
from archsearch.model.kernels.gemv import gemv_kernel, gemv_shape


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
    if batch > 1:
        return triton.cdiv(vocabulary, LOGIT_BLOCK)
    shape = gemv_shape(vocabulary, hidden, logits=True)
    return triton.cdiv(vocabulary, shape.rows * shape.steps)


def kernel_count(launch: Callable[..., None], batch: int) -> int:
    """Kernels of one launch of a chain: for several sequences a projection is a chain itself."""
    function, arguments = (launch.func, launch.args) if isinstance(launch, partial) else (launch, ())
    if batch == 1 or function not in (project, head):
        return 1
    epilogue = Epilogue.LOGITS if function is head else (arguments[3:4] or (Epilogue.PLAIN,))[0]
    norm = arguments[5] if function is head else (arguments[4:5] or (None,))[0]
    return 1 + (norm is not None) + (epilogue in (Epilogue.GATED, Epilogue.LOGITS))


def _run(x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue, norm: Norm | None, bias: Tensor | None,
         best: Tensor, best_row: Tensor) -> None:  # fmt: skip
    (batch, k), n = x.shape, out.shape[1]
    squares = None if norm is None else norm.squares
    gain = None if norm is None else norm.gain
    eps = 0.0 if norm is None else norm.eps
    if batch > 1:
        x = x if norm is None else normalize(x, gain, squares, eps)
        _multiply(x, weight, out, epilogue, bias)
        if epilogue == Epilogue.LOGITS:
            largest(out, best, best_row)
        return
    groups, parts = (1, 1) if squares is None else squares.shape[1:]
    tensors = (x, x if gain is None else gain, x if squares is None else squares, weight,
               x if bias is None else bias, out, best, best_row)  # fmt: skip
    constants = {"K": k, "GROUP": k // groups, "PARTS": parts, "PARTS_BLOCK": power_of_two(parts),
                 "GAIN": gain is not None, "SQUARES": squares is not None, "BIAS": bias is not None,
                 "EPILOGUE": int(epilogue)}  # fmt: skip
    cut = gemv_shape(n, k, epilogue == Epilogue.GATED, epilogue == Epilogue.LOGITS, k // groups)
    grid = (triton.cdiv(n, cut.rows * cut.steps),)
    sizes = {"ROWS": cut.rows, "STEPS": cut.steps, "CHUNK": cut.chunk}
    launch(gemv_kernel, grid, x, *tensors, n, eps, **constants, **sizes, warps=cut.warps)


def _multiply(x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue, bias: Tensor | None) -> None:
    if epilogue == Epilogue.GATED:
        gate(torch.mm(x, weight.T), out)
    elif epilogue == Epilogue.RESIDUAL:
        torch.addmm(out, x, weight.T, out=out)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


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
