"""Decode latency: the time to generate N tokens a sequence at batch B, one token a step.

Generation starts from an empty cache and includes embedding, operators, final norm, head, argmax and
the feedback of the token. Full attention slows down as the cache fills, so the step time is taken at
the middle of equal strata of positions, a run of advancing steps at each, and integrated.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from archsearch.architecture import Architecture
from archsearch.config import LatencyConfig
from archsearch.latency.bandwidth import Bandwidth, measure_bandwidth
from archsearch.latency.canary import make_canary
from archsearch.latency.device import DeviceInfo, describe, device_errors, require_memory
from archsearch.latency.lock import exclusive
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency.result import DecodeLatency, FullRun
from archsearch.latency.runtime import Runtime, make_runtime
from archsearch.latency.samples import summarize
from archsearch.latency.timing import (
    BUDGET,
    Plan,
    Run,
    fitted,
    integrate,
    interrupted,
    make_plan,
    time_all,
    time_steps,
    time_strata,
    undisturbed,
    warm_up,
)
from archsearch.latency.validity import (
    CHECKED_TOKENS,
    Disturbed,
    Errors,
    check_depth,
    check_end,
    check_position,
    check_runtime,
)
from archsearch.latency.watch import ATTEMPTS, Watch
from archsearch.model.hybrid import HybridLM, build_model

BUSY = 0.5
"""Share of interrupted steps above which a note says that the machine is busy."""


def measure_decode(
    architecture: Architecture,
    config: LatencyConfig,
    *,
    device: torch.device | str,
    model: HybridLM | None = None,
    full: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> DecodeLatency:
    """Measure how fast ``architecture`` decodes on ``device``.

    Args:
        architecture: what to measure.
        config: tokens, batch, strata, steps, repeats; ``dtype`` counts only without a ``model``.
        device: where to measure.
        model: with weights, on ``device``; random weights when absent.
        full: also decode all tokens once, and compare.
        on_wait: called when another measurement has the device.

    Raises:
        DoesNotFit: weights and state are larger than the free memory; nothing was allocated.
        InvalidMeasurement: the timed path is wrong, or the device was disturbed at each of a few attempts.
        EnvironmentUnfit: the device failed.
    """
    device, begin = torch.device(device), time.perf_counter()
    with device_errors(device), torch.inference_mode():
        if device.type == "cuda":
            make_canary(device)
            gc.collect()  # what an earlier one left would be freed in between, and the peak come out too low
        dtype = getattr(torch, config.dtype_on(device.type)) if model is None else model.embed_tokens.weight.dtype
        _check_fits(architecture, config, device, dtype, weights=model is None)
        held = _allocated(device) - sum(p.nbytes for p in model.parameters()) if model else _allocated(device)
        model = build_model(architecture, 0, device, dtype) if model is None else model
        runtime = make_runtime(model, config.batch, config.tokens)
        errors = [check_runtime(runtime, model, config.batch, config.tokens)]
        if device.type == "cuda":
            errors.append(check_depth(runtime, model, config.tokens))
        del model  # what the caller does not hold is no part of the peak memory
        prepared = time.perf_counter() - begin
        with exclusive(device, on_wait) as waited:
            timed = _until_undisturbed(runtime, config, device, full)
            timed.peak -= held
        check_end(runtime)
    return _result(architecture, config, runtime, timed, errors, prepared, waited)


@dataclass(slots=True)
class _Timed:
    """Runs of each stratum, and the circumstances they were taken in."""

    plan: Plan
    info: DeviceInfo
    bandwidth: Bandwidth
    watch: Watch
    runs: list[list[Run]] = field(default_factory=list)
    full: tuple[list[tuple[int, float]], float] | None = None
    peak: int = 0
    attempts: int = 1
    rejected: int = 0


def _until_undisturbed(runtime: Runtime, config: LatencyConfig, device: torch.device, full: bool) -> _Timed:
    """Measure until nothing disturbs. Raises the last ``Disturbed`` when that does not happen."""
    info, bandwidth = describe(device), measure_bandwidth(device)
    rejected = 0
    for attempt in range(1, ATTEMPTS + 1):
        timed = _Timed(make_plan(config), info, bandwidth, Watch(device, config.others))
        timed.attempts, timed.rejected = attempt, rejected
        try:
            _time(runtime, config, timed, full)
            return timed
        except Disturbed:
            rejected += sum(len(run.seconds) for stratum in timed.runs for run in stratum)
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _time(runtime: Runtime, config: LatencyConfig, timed: _Timed, full: bool) -> None:
    watch, cuda = timed.watch, runtime.token.is_cuda
    watch.notes.extend(timed.info.notes)
    runtime.begin()
    first = time_steps(runtime, timed.plan.starts[0], 1).seconds[0]
    plan = timed.plan = fitted(timed.plan, first)
    if plan.steps < min(config.steps, int(plan.width)):
        watch.notes.append(f"{plan.steps} of {config.steps} steps a stratum: one takes {first:.2g} s")
    if cuda:
        torch.cuda.reset_peak_memory_stats(runtime.token.device)
    if not warm_up(runtime, plan):
        watch.notes.append("the step time was not flat after the warm-up")
    timed.peak = torch.cuda.max_memory_allocated(runtime.token.device) if cuda else 0
    watch.sing()
    watch.look()
    timed.runs = time_strata(runtime, plan, config.repeats, watch.look)
    check_position(runtime, plan.starts[-1] + plan.steps)
    if full:
        timed.full = time_all(runtime, config.tokens)
        check_position(runtime, config.tokens)
    watch.sing()
    watch.look()
    if len(timed.runs[0]) < config.repeats:
        watch.notes.append(f"{len(timed.runs[0])} of {config.repeats} passes in {BUDGET:g} s")
    if (share := interrupted(timed.runs)) > BUSY:
        watch.notes.append(f"busy machine: other processes had the core during {share:.0%} of the steps")


def _result(
    architecture: Architecture,
    config: LatencyConfig,
    runtime: Runtime,
    timed: _Timed,
    errors: list[Errors],
    prepared: float,
    waited: float,
) -> DecodeLatency:
    samples = [undisturbed(stratum) for stratum in timed.runs]
    seconds, interval = integrate(samples, timed.plan.width)
    ms, width = 1e3 / config.tokens, runtime.logits.element_size()
    blocks = sum(len(run.seconds) for stratum in timed.runs for run in stratum)
    summary = summarize(samples, timed.rejected + blocks - sum(len(stratum) for stratum in samples))
    floor = _floor_ms(architecture, config.batch, timed, width)
    operators = [*(operator.kind for operator in architecture.operators), "head"]
    canary = timed.watch.canary
    return DecodeLatency(
        seconds=seconds,
        tpot_ms=seconds * ms,
        interval_ms=interval and (interval[0] * ms, interval[1] * ms),
        floor_ms=floor,
        floor_fraction=floor / (seconds * ms),
        positions=timed.plan.middles,
        step_ms=tuple(1e3 * float(np.median(stratum)) for stratum in samples),
        samples=summary,
        interrupted=interrupted(timed.runs),
        tokens=config.tokens,
        batch=config.batch,
        dtype=str(runtime.logits.dtype).removeprefix("torch."),
        path=runtime.path,
        threads=torch.get_num_threads(),
        logits_error=max(one.reference for one in errors),
        logits_fp32=max((one.fp32["logits"] for one in errors if one.fp32), default=None),
        weight_bytes=architecture.weight_bytes(width),
        state_bytes=architecture.state_bytes(config.tokens, batch=config.batch, width=width),
        step_bytes=architecture.step_bytes(config.tokens // 2, batch=config.batch, width=width),
        peak_bytes=timed.peak if timed.info.kind == "cuda" else None,
        kernels=runtime.kernels,
        kernels_per_token=sum(runtime.kernels.get(kind, 0) for kind in operators),
        bandwidth=timed.bandwidth,
        canary_ms=tuple(canary),
        canary_ratio=seconds * ms / canary[0] if canary else None,
        attempts=timed.attempts,
        prepared=prepared,
        waited=waited,
        device=timed.info,
        gpu=tuple(timed.watch.states),
        full=_full(timed, seconds),
        kernel_hash=kernel_hash(),
        protocol=VERSION,
        notes=_notes(architecture, timed, summary.narrow, width),
    )


def _floor_ms(architecture: Architecture, batch: int, timed: _Timed, width: int) -> float:
    moved = [architecture.step_bytes(middle, batch=batch, width=width) for middle in timed.plan.middles]
    return 1e3 * float(np.mean(moved)) / timed.bandwidth.read


def _full(timed: _Timed, strata_seconds: float) -> FullRun | None:
    if timed.full is None:
        return None
    stretches, wall = timed.full
    seconds = sum(taken for _, taken in stretches)
    return FullRun(
        seconds=seconds,
        wall_seconds=wall,
        stretch=stretches[0][0],
        curve_ms=tuple(1e3 * taken / steps for steps, taken in stretches),
        strata_error=abs(strata_seconds - seconds) / seconds,
    )


def _notes(architecture: Architecture, timed: _Timed, narrow: bool, width: int) -> tuple[str, ...]:
    notes = list(timed.watch.notes)
    if timed.info.kind == "cuda" and not narrow:
        notes.append("noisy: the interval of the median did not become narrow")
    if architecture.step_bytes(0, width=width) < timed.info.l2:
        notes.append("weights and state live in the GPU's cache: the floor, which counts memory, does not hold")
    return tuple(dict.fromkeys(notes))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _check_fits(
    architecture: Architecture, config: LatencyConfig, device: torch.device, dtype: torch.dtype, *, weights: bool
) -> None:
    """Refuse before anything is allocated: weights, state, and the logits of a step and of the check."""
    state = architecture.state_bytes(config.tokens, batch=config.batch, width=dtype.itemsize)
    logits = (2 * config.batch + 2 * CHECKED_TOKENS) * architecture.vocab_size * 4
    # On a GPU the runtime keeps merged copies of the weights beside the model, and the check a state of one sequence.
    copies = int(weights) + int(device.type == "cuda")
    check = architecture.state_bytes(config.tokens, width=dtype.itemsize) if device.type == "cuda" else 0
    needed = state + check + logits + copies * architecture.parameters * dtype.itemsize
    what = f"decoding {config.tokens} tokens at batch {config.batch} with {architecture.parameters:,} parameters"
    require_memory(device, needed, what)
