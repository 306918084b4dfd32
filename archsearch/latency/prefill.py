"""Prefill: the time from a prompt to the first token (TTFT), with the state written for the steps that follow.

No graph is needed: a prompt is a few hundred large kernels. On a GPU the mixers run the kernels they train with
(flash-linear-attention's chunks, PyTorch's fused attention), on a CPU the plain-torch reference.
"""

from __future__ import annotations

import importlib.util
import statistics
import time

import torch

from archsearch.architecture import Architecture
from archsearch.errors import EnvironmentUnfit, InvalidArchitecture
from archsearch.latency.device import free_memory
from archsearch.latency.validity import Errors, InvalidMeasurement, check_prefill
from archsearch.model.hybrid import DecodeState, HybridLM
from archsearch.schema import Frozen

LENGTHS = (512, 2048, 8192, 32768)
CHECKED = 300
"""Tokens of the prompt that is compared with the reference: several chunks, the last one not full."""
WARM_UPS, REPEATS = 2, 7
CPU_SECONDS = 3.0
"""On a CPU a prompt is left out that would take longer than this, judged by the one before."""


class Prefill(Frozen):
    """TTFT of one prompt length.

    Attributes:
        length: tokens of the prompt; meta tokens come on top.
        batch: prompts at once.
        ms: median.
        lowest_ms: of the repeats.
        tokens_per_second: of the prompts.
        peak_bytes: largest memory during the prefill, weights and state included; absent on a CPU.
    """

    length: int
    batch: int
    ms: float
    lowest_ms: float
    repeats: int
    tokens_per_second: float
    peak_bytes: int | None


class PrefillTimes(Frozen):
    """All lengths that were measured.

    Attributes:
        omitted: why other lengths were not.
        paths: which implementation of each kind ran.
        errors: against plain torch; absent where that is what ran, and where the comparison or the kernels failed.
    """

    measured: tuple[Prefill, ...]
    omitted: dict[int, str]
    paths: dict[str, str]
    errors: Errors | None


def implementation(device: torch.device) -> str:
    """What the mixers run with: flash-linear-attention's kernels on a GPU where they are installed."""
    return "fla" if device.type == "cuda" and importlib.util.find_spec("fla") is not None else "torch"


@torch.inference_mode()
def measure_prefill(model: HybridLM, batch: int, lengths: tuple[int, ...] | None = None) -> PrefillTimes:
    """Time prompts of ``lengths`` random tokens (``LENGTHS`` when absent), ``batch`` at once, on the model's device.

    A length that the memory does not hold, or that would take a CPU too long, is left out with the reason; all of
    them are where logits or states differ from those of the plain-torch reference.
    """
    path = implementation(model.embed_tokens.weight.device)
    try:
        errors = _checked(model, path) if path != "torch" else None
        measured, omitted = _measure_each(model.use(path), batch, lengths or LENGTHS)
        return PrefillTimes(measured=measured, omitted=omitted, paths=model.paths(), errors=errors)
    except (InvalidArchitecture, InvalidMeasurement, EnvironmentUnfit) as unfit:
        reasons = dict.fromkeys(lengths or LENGTHS, unfit.cause)
        return PrefillTimes(measured=(), omitted=reasons, paths=model.paths(), errors=None)
    finally:
        model.use("torch")


def _checked(model: HybridLM, path: str) -> Errors:
    """Errors of the libraries' kernels; what had to be tuned for it is kept for the next process.

    Raises:
        InvalidArchitecture, EnvironmentUnfit, InvalidMeasurement: an operator's options are beyond the kernels, a
            library is missing, or the two do not agree.
    """
    from archsearch.model.training_path import refuse_unsupported
    from archsearch.model.tuned import remember

    for layer in model.layers:
        layer.op.require()
        refuse_unsupported(layer.op.unsupported(), layer.kind)
    errors = check_prefill(model, path, CHECKED)
    remember()
    return errors


def _measure_each(model: HybridLM, batch: int, lengths: tuple[int, ...]) -> tuple[tuple[Prefill, ...], dict[int, str]]:
    """What was measured, and why the rest was not."""
    measured: list[Prefill] = []
    omitted: dict[int, str] = {}
    device = model.embed_tokens.weight.device
    for length in lengths:
        reason = _too_large(model.architecture, batch, length, device)
        reason = reason or _too_slow(model.architecture, measured, length)
        try:
            if not reason:
                measured.append(_measure(model, batch, length))
        except torch.OutOfMemoryError:
            reason = "ran out of memory"
            torch.cuda.empty_cache()
        if reason:
            omitted[length] = reason
    return tuple(measured), omitted


def _too_large(architecture: Architecture, batch: int, length: int, device: torch.device) -> str:
    width = 2 if device.type == "cuda" else 4
    needed = architecture.state_bytes(length, batch=batch, width=width) + 4 * batch * length * (
        architecture.hidden_size * width
    )
    free = free_memory(device)
    return f"needs more than {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else ""


def _too_slow(architecture: Architecture, measured: list[Prefill], length: int) -> str:
    if not measured or measured[-1].peak_bytes is not None:
        return ""
    power = 2 if any(operator.full_attention for operator in architecture.operators) else 1
    expected = measured[-1].ms / 1e3 * (length / measured[-1].length) ** power
    return f"would take a CPU {expected:.0f} s or more" if expected > CPU_SECONDS else ""


def _measure(model: HybridLM, batch: int, length: int) -> Prefill:
    weight = model.embed_tokens.weight
    device, cuda = weight.device, weight.is_cuda
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(weight), (batch, length), generator=generator).to(device)
    state = model.allocate_state(batch, length)
    repeats = REPEATS if cuda else 1
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UPS if cuda else 0):
        model.prefill(tokens, state)
    seconds = [_timed(model, tokens, state, cuda) for _ in range(repeats)]
    median = statistics.median(seconds)
    return Prefill(
        length=length,
        batch=batch,
        ms=1e3 * median,
        lowest_ms=1e3 * min(seconds),
        repeats=repeats,
        tokens_per_second=batch * length / median,
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def _timed(model: HybridLM, tokens: torch.Tensor, state: DecodeState, cuda: bool) -> float:
    """Seconds from the prompt to the first token and a state to go on from."""
    if not cuda:
        begun = time.perf_counter()
        model.prefill(tokens, state).argmax(-1)
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    model.prefill(tokens, state).argmax(-1)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
