"""The logistic function in four instructions, for kernels whose arithmetic is as long as their memory traffic."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

if knobs.runtime.interpret:  # it knows no libdevice

    @triton.jit
    def fast_sigmoid(x):
        """``1 / (1 + exp(-x))`` of fp32, to some units of the last place."""
        return tl.sigmoid(x)

else:

    @triton.jit
    def fast_sigmoid(x):
        """``1 / (1 + exp(-x))`` of fp32, to some units of the last place."""
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
