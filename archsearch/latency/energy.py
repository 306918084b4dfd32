"""Energy a token, from the counter of the GPU."""

from __future__ import annotations

import time

import torch

from archsearch.latency.lock import device_key
from archsearch.latency.nvml import GpuState, gpu_state
from archsearch.latency.runtime import Runtime
from archsearch.schema import Frozen

SECONDS = 3.0
"""The counter moves ten times a second or so: shorter runs would measure its steps."""
STEPS = 256


class Energy(Frozen):
    """What decoding draws.

    Attributes:
        joules_per_token: of the whole GPU, idle power included, over all sequences of the batch.
        watts: mean power.
        seconds: decoded for.
        context: tokens stored when the run began; it decodes the same stretch over and over.
    """

    joules_per_token: float
    watts: float
    seconds: float
    tokens: int
    context: int


def measure_energy(runtime: Runtime, context: int) -> tuple[Energy | None, str]:
    """Energy of ``STEPS`` steps from ``context`` on, over and over, on a GPU; and a note: why there is none."""
    device = runtime.token.device
    before, problem = _settled(device)
    if before is None:
        return None, f"energy: {problem}"
    begun, tokens = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        runtime.seek(context)
        for _ in range(STEPS):
            runtime.step()
        torch.cuda.synchronize(device)
        tokens += STEPS * len(runtime.token)
    after, problem = _settled(device)
    seconds = time.perf_counter() - begun
    if after is None or after.energy <= before.energy:
        return None, f"energy: {problem or 'the counter did not move'}"
    joules = after.energy - before.energy
    return Energy(
        joules_per_token=joules / tokens, watts=joules / seconds, seconds=seconds, tokens=tokens, context=context
    ), ""


def _settled(device: torch.device) -> tuple[GpuState | None, str]:
    torch.cuda.synchronize(device)
    return gpu_state(device_key(device))
