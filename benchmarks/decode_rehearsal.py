"""Compile the kernels of ``benchmarks/decode.py`` side by side, each process a share of them.

Compiled kernels are kept on disk by Triton, torch's compiler and the tuner, so what runs later finds them. A model is
stood in for by one operator of each sort it has: the kernels of its other layers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.latency.bandwidth import Bandwidth
from archsearch.latency.compiling import Task, compile_shared, compile_side_by_side, compile_step
from archsearch.latency.prefill import measure_prefill
from archsearch.latency.throughput import measure_throughput
from benchmarks.decode_parts import CONTEXTS, CUDA, OPERATOR_CONTEXT, OPERATORS, PARTS, ROOM, SHORT, WIDTHS, built
from benchmarks.transformers_generate import TOKENS, time_generate

LARGEST, CONTEXT = 256, 8192
"""Of the batches: with less stored than is timed, but as many splits of it."""
DECODED = 8192
ANY = Bandwidth(read=1e12, copied=1e12)
"""Only floors are computed from it, and nobody reads these."""


def sample(architecture: Architecture) -> Architecture:
    """The first operator of each sort."""
    return architecture.model_copy(update={"operators": tuple(dict.fromkeys(architecture.operators))})


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


def tasks(part: str, names: list[str]) -> Iterator[tuple[str, Task]]:
    """What compiles the kernels of the rows of a part."""
    for name in names or PARTS[part][1]:
        if part == "models":
            for length in (DECODED, CONTEXTS[-1] + ROOM, SHORT):
                yield f"{name} {length}", compiled(sample(load_architecture(name)), length)
        elif part == "operators":
            kind, hidden = name.split()[0], int(name.split()[1])
            one = make_architecture(hidden_size=hidden, vocab_size=1024, operators=[{"kind": kind, **OPERATORS[kind]}])
            yield name, compiled(one, 2 * OPERATOR_CONTEXT)
        elif part == "contexts":
            one = make_architecture(
                hidden_size=WIDTHS[0], vocab_size=1024, operators=[{"kind": name, **OPERATORS[name]}]
            )
            yield f"{name} {CONTEXTS[-1]}", compiled(one, CONTEXTS[-1] + ROOM)
        elif part == "throughput":
            yield f"{name} in batches", functools.partial(batches, name)
        elif part == "prefill":
            yield f"{name} prompts", functools.partial(prompts, name)
        elif part == "transformers":
            yield f"{name} transformers", functools.partial(generate, name)
            yield f"{name} {TOKENS}", compiled(sample(load_architecture(name)), TOKENS)


def compiled(architecture: Architecture, length: int) -> Task:
    """One decode step at batch 1."""
    return functools.partial(compile_step, architecture, 1, length, str(CUDA), "bfloat16")


def rehearse(parts: list[str], names: list[str], processes: int) -> None:
    """Run all tasks, so many at a time; one that fails is told, and what it would have compiled is compiled later."""
    work: dict[str, Task] = {"shared": functools.partial(compile_shared, str(CUDA))}
    for part in parts:
        work.update(tasks(part, names))
    compile_side_by_side(work, functools.partial(print, flush=True), processes)
