"""What all decode kernels share: how they are launched, and a few device functions.

Kernels take their configuration as plain arguments and nothing is tuned at run time, so a kernel
behaves the same in every process, and in Triton's interpreter on a CPU (``TRITON_INTERPRET=1``).

Programmatic dependent launch (Hopper and later): a kernel may start as soon as all programs of the one before it
have started. Before ``wait`` it reads only what does not change within a step, that is weights, the position and
states, which another step wrote; and it reads what changes at all around the L1 (``.cg``). Only ``select``, which
ends a step, holds the next kernel back until it is done, so that steps do not overlap.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any, grid: Sequence[int], like: torch.Tensor, *args: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Run ``kernel`` on the device of ``like``, overlapping with its neighbours where the device can.

    Args:
        kernel: a ``triton.jit`` function whose last constant is ``PDL``.
        grid: programs along each axis.
        like: any of the tensors.
        args: arguments by position.
        warps: warps a program.
        stages: depth of software pipelining.
        constants: compile-time constants by name.
    """
    if triton.knobs.runtime.interpret:
        kernel[tuple(grid)](*args, **constants, PDL=False)
        return
    pdl = _overlaps(like.get_device())
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl}
    kernel[tuple(grid)](*args, **constants, PDL=pdl, **options)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides ``size``."""
    return size & -size


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait until all that earlier kernels wrote is visible."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def silu(x):
    """X sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); past 20 that is x in fp32, and exp would overflow later."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
