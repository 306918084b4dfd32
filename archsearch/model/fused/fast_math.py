"""Exponentials without the instructions that look after denormal numbers, for kernels whose arithmetic takes as long
as their memory traffic; exact to some units in the last place of fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

if knobs.runtime.interpret:  # it knows no libdevice

    @triton.jit
    def fast_exp2(x):
        """``2^x``."""
        return tl.exp2(x)

    @triton.jit
    def fast_sigmoid(x):
        """``1 / (1 + exp(-x))``."""
        return tl.sigmoid(x)

else:

    @triton.jit
    def fast_exp2(x):
        """``2^x``."""
        return libdevice.exp2(x)

    @triton.jit
    def fast_sigmoid(x):
        """``1 / (1 + exp(-x))``."""
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
