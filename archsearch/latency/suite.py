"""Everything that ``archsearch latency`` measures of one architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from archsearch.architecture import Architecture
from archsearch.config import LatencyConfig
from archsearch.latency.decode import measure_decode
from archsearch.latency.device import device_errors
from archsearch.latency.energy import STEPS, Energy, measure_energy
from archsearch.latency.exact import Exact, measure_exact
from archsearch.latency.lock import exclusive
from archsearch.latency.prefill import PrefillTimes, measure_prefill
from archsearch.latency.result import DecodeLatency
from archsearch.latency.runtime import make_runtime
from archsearch.latency.throughput import Throughput, measure_throughput
from archsearch.latency.watch import watched
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.schema import Frozen

Say = Callable[[str], None]


class LatencyReport(Frozen):
    """Decode, prefill, throughput, energy, and full runs where they were asked for. Memory is in ``decode``."""

    decode: DecodeLatency
    prefill: PrefillTimes
    throughput: Throughput
    energy: Energy | None
    exact: Exact | None
    notes: tuple[str, ...]


def measure_all(
    architecture: Architecture,
    config: LatencyConfig,
    *,
    device: torch.device,
    context: int | None = None,
    exact: bool = False,
    say: Say = lambda text: None,
) -> LatencyReport:
    """Measure ``architecture`` on ``device``, with random weights.

    Args:
        architecture: what to measure.
        config: of the decode latency; prefill and energy take its batch.
        device: where to measure.
        context: tokens stored in each sequence while the throughput is measured; ``config.tokens`` when absent.
        exact: also decode all tokens in fresh processes.
        say: told what begins.

    Raises:
        DoesNotFit: the memory does not hold the decoding of one batch.
        InvalidMeasurement: a path is wrong, or the device was disturbed each time.
        EnvironmentUnfit: the device failed.
    """
    waiting = lambda: say("another measurement has this device: waiting")  # noqa: E731
    full = None
    if exact:  # first, while this process has nothing on the device
        say(f"decoding all {config.tokens:,} tokens in fresh processes")
        full = measure_exact(architecture, config, str(device))
    say("decode")
    decode = measure_decode(architecture, config, device=device, on_wait=waiting)
    with device_errors(device), torch.inference_mode():
        model = build_model(architecture, 0, device, getattr(torch, decode.dtype))
        with exclusive(device, waiting):
            energy, notes = _energy(model, config, device)
            say("prefill")
            prefill, more = watched(device, config.others, lambda: measure_prefill(model, config.batch))
            say("throughput")
            run = lambda: measure_throughput(model, context or config.tokens, decode.bandwidth)  # noqa: E731
            throughput, most = watched(device, config.others, run)
    told = [*decode.notes, *notes, *more, *most, *(full.notes if full else ())]
    return LatencyReport(
        decode=decode,
        prefill=prefill,
        throughput=throughput,
        energy=energy,
        exact=full,
        notes=tuple(dict.fromkeys(told)),
    )


def _energy(model: HybridLM, config: LatencyConfig, device: torch.device) -> tuple[Energy | None, list[str]]:
    if device.type == "cpu":
        return None, ["on a CPU: energy is not measured"]
    middle = config.tokens // 2
    runtime = make_runtime(model, config.batch, middle + STEPS)
    runtime.begin()
    (found, problem), notes = watched(device, config.others, lambda: measure_energy(runtime, middle))
    return found, [*notes, *([problem] if problem else [])]
