"""Compile the kernels of ``benchmarks/decode.py`` side by side, each process a share of them.

Compiled kernels are kept on disk by Triton, torch's compiler and the tuner, so what runs later finds them. A model is
stood in for by one operator of each sort it has: the kernels of its other layers are the same.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.latency.bandwidth import GRANULE, Bandwidth
from archsearch.latency.canary import make_canary
from archsearch.latency.prefill import measure_prefill
from archsearch.latency.throughput import measure_throughput
from archsearch.model.decode import DecodePlan
from archsearch.model.kernels.bandwidth import read_sums
from benchmarks.decode_parts import CONTEXTS, CUDA, OPERATOR_CONTEXT, OPERATORS, PARTS, ROOM, SHORT, WIDTHS, built
from benchmarks.transformers_generate import TOKENS, time_generate

LARGEST, CONTEXT = 256, 8192
"""Of the batches: with less stored than is timed, but as many splits of it."""
DECODED = 8192
ANY = Bandwidth(read=1e12, copied=1e12)
"""Only floors are computed from it, and nobody reads these."""
Task = Callable[[], object]


def sample(architecture: Architecture) -> Architecture:
    """The first operator of each sort."""
    return architecture.model_copy(update={"operators": tuple(dict.fromkeys(architecture.operators))})


def step(architecture: Architecture, length: int) -> None:
    """One decode step at batch 1."""
    with torch.inference_mode():
        DecodePlan(built(architecture), 1, length).step()
    torch.cuda.synchronize()


def batches(name: str) -> None:
    """Steps of doubling batches."""
    with torch.inference_mode():
        measure_throughput(built(sample(load_architecture(name))), CONTEXT, ANY, largest=LARGEST)


def prompts(name: str) -> None:
    """Prompts of all lengths, through what the mixers of this device run with."""
    with torch.inference_mode():
        found = measure_prefill(built(sample(load_architecture(name))), 1)
    print(name, found.paths, "errors", found.errors, found.omitted or "", flush=True)


def generate(name: str) -> None:
    """One run of transformers, which compiles all of its layers."""
    found = time_generate(load_architecture(name), CUDA, runs=1)
    print(f"{name}: transformers compiled, {found['first_seconds']:.1f} s for {TOKENS} tokens", flush=True)


def shared() -> None:
    """What every measurement runs."""
    read_sums(torch.zeros(4 * GRANULE, dtype=torch.int32, device=CUDA), torch.zeros(16, dtype=torch.int32, device=CUDA))
    make_canary(CUDA)


def freed(task: Task) -> None:
    """Run a task and give its memory back: other processes do the same beside this one."""
    try:
        task()
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def tasks(part: str, names: list[str]) -> Iterator[tuple[str, Task]]:
    """What compiles the kernels of the rows of a part."""
    for name in names or PARTS[part][1]:
        if part == "models":
            for length in (DECODED, CONTEXTS[-1] + ROOM, SHORT):
                yield f"{name} {length}", functools.partial(step, sample(load_architecture(name)), length)
        elif part == "operators":
            kind, hidden = name.split()[0], int(name.split()[1])
            one = make_architecture(hidden_size=hidden, vocab_size=1024, operators=[{"kind": kind, **OPERATORS[kind]}])
            yield name, functools.partial(step, one, 2 * OPERATOR_CONTEXT)
        elif part == "contexts":
            one = make_architecture(
                hidden_size=WIDTHS[0], vocab_size=1024, operators=[{"kind": name, **OPERATORS[name]}]
            )
            yield f"{name} {CONTEXTS[-1]}", functools.partial(step, one, CONTEXTS[-1] + ROOM)
        elif part == "throughput":
            yield f"{name} in batches", functools.partial(batches, name)
        elif part == "prefill":
            yield f"{name} prompts", functools.partial(prompts, name)
        elif part == "transformers":
            yield f"{name} transformers", functools.partial(generate, name)
            yield f"{name} {TOKENS}", functools.partial(step, sample(load_architecture(name)), TOKENS)


def rehearse(parts: list[str], names: list[str], processes: int) -> None:
    """Run all tasks, so many at a time; one that fails is told, and what it would have compiled is compiled later."""
    work = [("shared", shared), *(task for part in parts for task in tasks(part, names))]
    begun = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(freed, task): name for name, task in work}
        for done in as_completed(waiting):
            error = done.exception()
            told = f"{type(error).__name__}: {error}" if error else "compiled"
            print(f"{time.perf_counter() - begun:6.1f} s {waiting[done]}: {told}", flush=True)
