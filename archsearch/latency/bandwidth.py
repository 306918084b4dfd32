"""The memory bandwidth that this process reaches on its device: the yardstick of every floor."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from archsearch.latency.device import free_memory
from archsearch.schema import Frozen

GPU_BYTES, CPU_BYTES = 2**32, 2**27
"""Sizes read: far beyond the last cache of a GPU, beyond that of most CPUs."""
GRANULE = 16384 * 4
"""Bytes that a program of the reading kernel takes."""
REPEATS = 7


class Bandwidth(Frozen):
    """Bytes a second: of a kernel that only reads, and of a copy (read plus written)."""

    read: float
    copied: float


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Calibrate ``device``; once a process (and, on a CPU, number of threads), later calls give the same numbers."""
    return _measured(device, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measured(device: torch.device, threads: int) -> Bandwidth:
    size = CPU_BYTES
    if device.type == "cuda":
        size = min(GPU_BYTES, free_memory(device) // 4) // GRANULE * GRANULE
    x = torch.rand(size // 4, device=device)
    y = torch.empty_like(x)
    found = Bandwidth(
        read=size / _seconds(_reader(x), device), copied=2 * size / _seconds(functools.partial(y.copy_, x), device)
    )
    del x, y
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _reader(x: Tensor) -> Callable[[], object]:
    if not x.is_cuda:
        return x.sum
    from archsearch.model.kernels.bandwidth import read_sums

    bits = x.view(torch.int32)
    return functools.partial(read_sums, bits, bits.new_empty(x.nbytes // GRANULE))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of ``run`` after one that does not count."""
    run()
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(REPEATS):
            run()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
