"""Compiles decode kernels side by side, each process a share of them, before anything is timed.

Triton keeps compiled kernels on disk, so what runs later finds them. One process would compile them one after the
other, for minutes where a space has many operators.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from archsearch.architecture import Architecture
from archsearch.latency.bandwidth import GRANULE
from archsearch.latency.canary import make_canary
from archsearch.model.decode import DecodePlan
from archsearch.model.hybrid import build_model

Task = Callable[[], object]
MOST_PROCESSES = 12
"""Each has a context of its own on the GPU, about half a gigabyte."""


def compile_side_by_side(
    tasks: Mapping[str, Task], say: Callable[[str], None], processes: int | None = None
) -> dict[str, str]:
    """Run picklable tasks in fresh processes: what failed, by name, with the reason.

    A failure costs time only: what was not compiled here is compiled where it is needed.

    Args:
        tasks: what compiles something, by name.
        say: told what is done.
        processes: at a time; as many as there are cores, up to ``MOST_PROCESSES``, when absent.
    """
    begun, failed = time.perf_counter(), {}
    most = processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(most, len(tasks))), mp_context=context) as pool:
        waiting = {pool.submit(_freed, task): name for name, task in tasks.items()}
        for done in as_completed(waiting):
            name, error = waiting[done], done.exception()
            if error is not None:
                failed[name] = f"{type(error).__name__}: {error}"
            say(f"{time.perf_counter() - begun:6.1f} s {name}: {failed.get(name, 'compiled')}")
    return failed


def _freed(task: Task) -> None:
    """Run a task and give its memory back: other processes do the same beside this one."""
    try:
        task()
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def compile_step(architecture: Architecture, batch: int, tokens: int, device: str, dtype: str) -> None:
    """One decode step with room for ``tokens`` tokens: every kernel of it is compiled then."""
    with torch.inference_mode():
        DecodePlan(build_model(architecture, 0, device, getattr(torch, dtype)), batch, tokens).step()
    torch.cuda.synchronize(device)


def compile_shared(device: str) -> None:
    """What every measurement runs: the kernel that reads memory, and the canary."""
    from archsearch.model.kernels.bandwidth import read_sums

    place = torch.device(device)
    read_sums(*(torch.zeros(count, dtype=torch.int32, device=place) for count in (4 * GRANULE, 16)))
    make_canary(place)
