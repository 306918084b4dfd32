"""Throughput: tokens a second of many sequences at once, at one context, doubling the batch to the memory limit."""

from __future__ import annotations

import statistics

import torch

from archsearch.latency.bandwidth import Bandwidth
from archsearch.latency.device import free_memory
from archsearch.latency.runtime import make_runtime
from archsearch.latency.timing import time_steps
from archsearch.latency.validity import check_end, check_position, check_runtime
from archsearch.model.hybrid import HybridLM
from archsearch.schema import Frozen

STEPS, RUNS = 32, 3
ROOM = STEPS + 8
"""Tokens of room behind the context."""
SHARE = {"cuda": 0.95, "cpu": 0.25}
"""Share of the free memory that may be taken: a CPU's belongs to others, too."""
CPU_SECONDS = 2.0
"""On a CPU doubling ends where a step would take so long that this is not enough for the timed ones."""
MOST = 2**16


class BatchSpeed(Frozen):
    """Decoding of one batch.

    Attributes:
        batch: sequences at once.
        step_ms: median time of a step, which gives each sequence one token.
        tokens_per_second: over all sequences.
        state_bytes: memory of all their states.
        floor_fraction: time that the bytes alone would need, over the step's.
        logits_error: largest relative error of the first and last sequence against the forward pass.
    """

    batch: int
    step_ms: float
    tokens_per_second: float
    state_bytes: int
    floor_fraction: float
    logits_error: float


class Throughput(Frozen):
    """Doubling batches at ``context`` tokens stored in each sequence, and what ended the doubling."""

    context: int
    batches: tuple[BatchSpeed, ...]
    ended: str

    @property
    def best(self) -> BatchSpeed | None:
        """The batch with most tokens a second; None where not even one sequence fits."""
        return max(self.batches, key=lambda batch: batch.tokens_per_second, default=None)


@torch.inference_mode()
def measure_throughput(model: HybridLM, context: int, bandwidth: Bandwidth, largest: int = MOST) -> Throughput:
    """Decode batches of 1, 2, 4, ... sequences with ``context`` tokens each until the memory is full, or ``largest``.

    Raises:
        InvalidMeasurement: a batch computes something else than the forward pass.
    """
    device = model.embed_tokens.weight.device
    found: list[BatchSpeed] = []
    batch = 1
    while not (ended := _limit(model, batch, context, largest, found)):
        try:
            found.append(_measure(model, batch, context, bandwidth))
        except torch.OutOfMemoryError:
            ended = f"batch {batch} ran out of memory"
            break
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        batch *= 2
    return Throughput(context=context, batches=tuple(found), ended=ended)


def _limit(model: HybridLM, batch: int, context: int, largest: int, found: list[BatchSpeed]) -> str:
    """Why ``batch`` is not tried; empty where it is."""
    if batch > largest:
        return f"batch {largest} is the largest tried"
    weight = model.embed_tokens.weight
    needed = model.architecture.state_bytes(context + ROOM, batch=batch, width=weight.element_size())
    copies = model.architecture.weight_bytes(weight.element_size()) if weight.is_cuda else 0
    logits = 2 * batch * len(weight) * weight.element_size()
    if needed + copies + logits > SHARE[weight.device.type] * free_memory(weight.device):
        return f"batch {batch} does not fit the memory"
    if not weight.is_cuda and found and found[-1].step_ms * RUNS * STEPS > 1e3 * CPU_SECONDS:
        return f"batch {batch} would take this CPU too long"
    return ""


def _measure(model: HybridLM, batch: int, context: int, bandwidth: Bandwidth) -> BatchSpeed:
    architecture, width = model.architecture, model.embed_tokens.weight.element_size()
    runtime = make_runtime(model, batch, context + ROOM)
    errors = check_runtime(runtime, model, batch, context + ROOM)
    first = time_steps(runtime, context, 1).seconds[0]
    steps = STEPS if runtime.token.is_cuda else max(1, min(STEPS, int(CPU_SECONDS / RUNS / first)))
    time_steps(runtime, context, steps)
    seconds = statistics.median(x for _ in range(RUNS) for x in time_steps(runtime, context, steps).seconds)
    check_position(runtime, context + steps)
    check_end(runtime)
    floor = architecture.step_bytes(context + STEPS // 2, batch=batch, width=width) / bandwidth.read
    return BatchSpeed(
        batch=batch,
        step_ms=1e3 * seconds,
        tokens_per_second=batch / seconds,
        state_bytes=architecture.state_bytes(context + ROOM, batch=batch, width=width),
        floor_fraction=floor / seconds,
        logits_error=errors.reference,
    )
