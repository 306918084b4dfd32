"""What a measurement of decoding leaves: the numbers, and everything that they stand on."""

from __future__ import annotations

from archsearch.latency.bandwidth import Bandwidth
from archsearch.latency.device import DeviceInfo
from archsearch.latency.nvml import GpuState
from archsearch.latency.samples import Samples
from archsearch.schema import Frozen


class FullRun(Frozen):
    """The definition itself: every token decoded, one after the other, from an empty cache.

    Attributes:
        seconds: for all tokens: by the clock of a GPU, by the time that the core spent on one thread of a CPU.
        wall_seconds: by the host's clock.
        curve_ms: mean step time of each stretch of ``stretch`` tokens.
        strata_error: |strata - full| / full of the same process: how far the short measurement is off.
    """

    seconds: float
    wall_seconds: float
    stretch: int
    curve_ms: tuple[float, ...]
    strata_error: float


class DecodeLatency(Frozen):
    """One measured decode latency and what it stands on.

    Attributes:
        seconds: to decode ``tokens`` tokens a sequence, ``batch`` sequences at once.
        tpot_ms: milliseconds a token, the mean over all positions.
        interval_ms: 95 % interval of ``tpot_ms``; absent when there are too few samples to tell.
        floor_ms: what a token would take if only its bytes were moved, at the bandwidth measured in this process.
        floor_fraction: ``floor_ms / tpot_ms``; above 1 the model lives in a cache, or something is wrong.
        positions: tokens in the cache at the middle of each stratum.
        step_ms: median step time at each of ``positions``.
        samples: the timed blocks (a step on a CPU, groups of steps on a GPU).
        interrupted: share of the timed steps during which another process had the core (CPU, one thread).
        logits_error: largest relative error of the steps' logits against the forward pass.
        logits_fp32: where that was beyond the bound of bf16, the error of the steps and of the forward pass, each
            against fp32, which decided.
        step_bytes: bytes that a step must move when half of the tokens are decoded.
        peak_bytes: largest memory of this process on the GPU while it decoded; absent on a CPU.
        kernels: launches of one operator of each kind, and of ``head``; empty where nobody counts them.
        kernels_per_token: of a whole step; 0 where nobody counts them.
        canary_ms: step time of the canary before and after.
        canary_ratio: ``tpot_ms`` in units of the canary's step; absent without one.
        attempts: measurements until one was undisturbed.
        prepared: seconds spent building, compiling, capturing and checking before.
        waited: seconds spent waiting for another measurement on this device to end.
        gpu: NVML's view before, between and after the passes.
        full: the run of all tokens, where it was asked for.
        notes: everything that weakens the number.
    """

    seconds: float
    tpot_ms: float
    interval_ms: tuple[float, float] | None
    floor_ms: float
    floor_fraction: float
    positions: tuple[int, ...]
    step_ms: tuple[float, ...]
    samples: Samples
    interrupted: float
    tokens: int
    batch: int
    dtype: str
    path: str
    threads: int
    logits_error: float
    logits_fp32: tuple[float, float] | None = None
    weight_bytes: int
    state_bytes: int
    step_bytes: int
    peak_bytes: int | None
    kernels: dict[str, int]
    kernels_per_token: int
    bandwidth: Bandwidth
    canary_ms: tuple[float, ...]
    canary_ratio: float | None
    attempts: int
    prepared: float
    waited: float
    device: DeviceInfo
    gpu: tuple[GpuState, ...] = ()
    full: FullRun | None = None
    kernel_hash: str
    protocol: int
    notes: tuple[str, ...] = ()
