"""The canary: a small fixed model whose step time shows what the counters of a GPU do not.

It is timed right before and after every measurement. When it moved, the device changed in between (clocks, heat, a
process that is hidden from us), and the measurement does not count.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch

from archsearch.architecture import make_architecture
from archsearch.latency.runtime import Runtime, make_runtime
from archsearch.latency.timing import time_steps
from archsearch.model.hybrid import build_model

TOKENS, STEPS, RUNS = 256, 64, 3
AGREE, LONGEST = 0.003, 2.0
"""Relative difference of two runs in a row, and seconds after which the last one is taken as it is."""
FIELDS = {"hidden_size": 2048, "vocab_size": 32768, "operators": "f f f f", "options": {"f": {"ratio": 3}}}
"""About 220 M parameters: far larger than the last cache, and no kernels that a candidate would not need."""


@functools.cache
def make_canary(device: torch.device) -> Runtime:
    """Build it, once a process; before anything large is, or there might be no room left for it."""
    with torch.inference_mode():
        runtime = make_runtime(build_model(make_architecture(**FIELDS), 0, device, torch.bfloat16), 1, TOKENS)
        runtime.begin()
        time_steps(runtime, 0, STEPS)
    return runtime


def canary_bytes() -> int:
    """What a step of it moves."""
    return make_architecture(**FIELDS).step_bytes(0)


def time_canary(device: torch.device) -> float:
    """Milliseconds a step of the canary on a GPU, once two runs agree.

    The mean, not the median: another process that has the GPU in between shall show.
    """
    runtime, before, end = make_canary(device), 0.0, time.perf_counter() + LONGEST
    while True:
        now = statistics.mean(x for _ in range(RUNS) for x in time_steps(runtime, 0, STEPS).seconds)
        if abs(now - before) <= AGREE * now or time.perf_counter() > end:
            return 1e3 * now
        before = now
