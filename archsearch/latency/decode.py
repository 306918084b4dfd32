"""Decode latency: the time to generate N tokens a sequence at batch B, one token a step.

Generation starts from an empty cache and includes embedding, operators, final norm, head, argmax and
the feedback of the token. Full attention slows down as the cache fills, so the step time is taken at
the middle of equal strata of positions, a run of advancing steps at each, and integrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from archsearch.architecture import Architecture
from archsearch.config import LatencyConfig
from archsearch.latency.device import DeviceInfo, describe, exclusive, require_memory
from archsearch.latency.nvml import GpuState, gpu_state
from archsearch.latency.runtime import Runtime, make_runtime
from archsearch.latency.timing import (
    BUDGET,
    Plan,
    Run,
    integrate,
    interrupted,
    make_plan,
    time_strata,
    undisturbed,
    warm_up,
)
from archsearch.latency.validity import CHECKED_TOKENS, check_end, check_position, check_runtime
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.schema import Frozen

BUSY = 0.5
"""Share of interrupted steps above which a note says that the machine is busy."""


class DecodeLatency(Frozen):
    """One measured decode latency and what it stands on.

    Attributes:
        seconds: to decode ``tokens`` tokens a sequence, ``batch`` sequences at once.
        tpot_ms: milliseconds a token, the mean over all positions.
        interval_ms: 95 % interval of ``tpot_ms``; absent when there are too few samples to tell.
        positions: tokens in the cache at the middle of each stratum.
        step_ms: median step time at each of ``positions``.
        samples: timed steps that count (groups of steps on a GPU).
        interrupted: share of the timed steps during which another process had the core (CPU, one thread).
        logits_error: largest relative error of the steps' logits against the forward pass.
        step_bytes: bytes that a step must move when half of the tokens are decoded.
        waited: seconds spent waiting for another measurement on this device to end.
        gpu: NVML's view before and after.
        notes: everything that weakens the number.
    """

    seconds: float
    tpot_ms: float
    interval_ms: tuple[float, float] | None
    positions: tuple[int, ...]
    step_ms: tuple[float, ...]
    samples: int
    interrupted: float
    tokens: int
    batch: int
    dtype: str
    path: str
    threads: int
    logits_error: float
    weight_bytes: int
    state_bytes: int
    step_bytes: int
    waited: float
    device: DeviceInfo
    gpu: tuple[GpuState, ...] = ()
    notes: tuple[str, ...] = ()


def measure_decode(
    architecture: Architecture,
    config: LatencyConfig,
    *,
    device: torch.device | str,
    model: HybridLM | None = None,
) -> DecodeLatency:
    """Measure how fast ``architecture`` decodes on ``device``.

    Args:
        architecture: what to measure.
        config: tokens, batch, strata, steps, repeats; ``dtype`` counts only without a ``model``.
        device: where to measure.
        model: with weights, on ``device``; random weights when absent.

    Raises:
        DoesNotFit: weights and state are larger than the free memory; nothing was allocated.
        InvalidMeasurement: the timed path is wrong, or the device was disturbed.
    """
    device = torch.device(device)
    dtype = _dtype(config.dtype, device) if model is None else model.embed_tokens.weight.dtype
    _check_fits(architecture, config, device, dtype, weights=model is None)
    with torch.inference_mode():
        model = build_model(architecture, 0, device, dtype) if model is None else model
        runtime = make_runtime(model, config.batch, config.tokens)
        error = check_runtime(runtime, model, config.batch, config.tokens)
        with exclusive(device) as waited:
            timed = _time(runtime, config, describe(device))
        check_end(runtime, timed.states)
    return _result(architecture, config, runtime, timed, error, waited)


@dataclass(frozen=True, slots=True)
class _Timed:
    """Runs of each stratum, and the circumstances they were taken in."""

    plan: Plan
    runs: list[list[Run]]
    info: DeviceInfo
    states: list[GpuState]
    notes: list[str]


def _time(runtime: Runtime, config: LatencyConfig, info: DeviceInfo) -> _Timed:
    plan = make_plan(config)
    notes = list(info.notes)
    runtime.begin()
    if not warm_up(runtime, plan):
        notes.append("the step time was not flat after the warm-up")
    states = _observe(info, notes)
    runs = time_strata(runtime, plan, config.repeats)
    check_position(runtime, plan.starts[-1] + plan.steps)
    if len(runs[0]) < config.repeats:
        notes.append(f"{len(runs[0])} of {config.repeats} passes in {BUDGET:g} s")
    if (share := interrupted(runs)) > BUSY:
        notes.append(f"busy machine: other processes had the core during {share:.0%} of the steps")
    states += _observe(info, notes)
    return _Timed(plan, runs, info, states, notes)


def _observe(info: DeviceInfo, notes: list[str]) -> list[GpuState]:
    """NVML's view of a GPU; nothing on a CPU. What is missing or disturbs goes to ``notes``."""
    if info.kind == "cpu":
        return []
    state, problem = gpu_state(info.uuid)
    if state is None:
        notes.append(problem)
        return []
    if state.processes > 1:
        notes.append(f"{state.processes} processes on the GPU")
    return [state]


def _result(
    architecture: Architecture, config: LatencyConfig, runtime: Runtime, timed: _Timed, error: float, waited: float
) -> DecodeLatency:
    samples = [undisturbed(stratum) for stratum in timed.runs]
    seconds, interval = integrate(samples, timed.plan.width)
    ms = 1e3 / config.tokens
    width = runtime.logits.element_size()
    return DecodeLatency(
        seconds=seconds,
        tpot_ms=seconds * ms,
        interval_ms=interval and (interval[0] * ms, interval[1] * ms),
        positions=timed.plan.middles,
        step_ms=tuple(1e3 * float(np.median(stratum)) for stratum in samples),
        samples=sum(len(stratum) for stratum in samples),
        interrupted=interrupted(timed.runs),
        tokens=config.tokens,
        batch=config.batch,
        dtype=str(runtime.logits.dtype).removeprefix("torch."),
        path=runtime.path,
        threads=torch.get_num_threads(),
        logits_error=error,
        weight_bytes=architecture.weight_bytes(width),
        state_bytes=architecture.state_bytes(config.tokens, batch=config.batch, width=width),
        step_bytes=architecture.step_bytes(config.tokens // 2, batch=config.batch, width=width),
        waited=waited,
        device=timed.info,
        gpu=tuple(timed.states),
        notes=tuple(dict.fromkeys(timed.notes)),
    )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _check_fits(
    architecture: Architecture, config: LatencyConfig, device: torch.device, dtype: torch.dtype, *, weights: bool
) -> None:
    """Refuse before anything is allocated: weights, state, and the logits of a step and of the check."""
    state = architecture.state_bytes(config.tokens, batch=config.batch, width=dtype.itemsize)
    logits = (2 * config.batch + 2 * CHECKED_TOKENS) * architecture.vocab_size * 4
    # On a GPU the runtime keeps merged copies of the weights beside the model.
    copies = int(weights) + int(device.type == "cuda")
    needed = state + logits + copies * architecture.parameters * dtype.itemsize
    what = f"decoding {config.tokens} tokens at batch {config.batch} with {architecture.parameters:,} parameters"
    require_memory(device, needed, what)
