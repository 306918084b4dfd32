"""One architecture by itself: its proxy training, and how fast it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from archsearch.architecture import Architecture
from archsearch.commands.console import say, stderr
from archsearch.commands.spaces import describe_architecture, duration
from archsearch.config import LatencyConfig, ProxyConfig
from archsearch.evaluation import perplexity

SECONDS_A_LINE = 60.0


class TrainingProgress:
    """Tells how a training goes: a live line on a terminal, one line a minute elsewhere. Measurements pass then."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.give_way: Callable[[], None] = lambda: None
        self.start = self.last = time.monotonic()
        self.live = stderr().is_terminal and not stderr().is_dumb_terminal

    def __call__(self, tokens: int, loss: float) -> None:
        self.give_way()
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else SECONDS_A_LINE):
            return
        self.last = now
        left = (now - self.start) * max(0, self.total - tokens) / tokens
        line = f"{tokens:,} of {self.total:,} tokens, training loss {loss:.3f}, {duration(left)} left"
        if self.live:
            stderr().print(f"\r\x1b[2K{line}", end="")
        else:
            say(line)

    def close(self) -> None:
        """End the live line."""
        if self.live:
            stderr().print("\r\x1b[2K", end="")


def train(architecture: Architecture, config: ProxyConfig, *, seed: int, device: str) -> dict[str, Any]:
    """Train the proxy of ``architecture``; the result as plain data."""
    from archsearch.latency.device import device_errors, resolve_device
    from archsearch.latency.lock import sharing
    from archsearch.proxy.data import load_corpus
    from archsearch.proxy.trainer import train_proxy

    where = resolve_device(device)
    progress = TrainingProgress(config.tokens)
    try:
        with device_errors(where), sharing(where) as give_way:
            progress.give_way = give_way
            result = train_proxy(architecture, config, seed=seed, device=where, on_progress=progress)
    finally:
        progress.close()
    return {
        "architecture": describe_architecture(architecture),
        "loss": result.loss,
        "perplexity": perplexity(result.loss),
        "bits_per_byte": load_corpus(config, architecture.vocab_size).bits_per_byte(result.loss),
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "curve": [list(point) for point in result.curve],
        "seconds": result.seconds,
        "paths": result.paths,
        "seed": seed,
        "device": str(where),
        "dtype": result.dtype,
    }


def train_lines(result: dict[str, Any]) -> list[str]:
    """The result of ``train`` as text."""
    bits = f", {result['bits_per_byte']:.4f} bits a byte" if result["bits_per_byte"] is not None else ""
    return [
        _head(result["architecture"]),
        f"loss {result['loss']:.4f} nats a token, perplexity {round(result['perplexity'], 2):,.6g}{bits}",
        f"{result['tokens']:,} tokens trained, {result['tokens_per_second']:,.0f} a second, "
        f"on {result['device']} in {result['dtype']}",
    ]


def measure(
    architecture: Architecture, config: LatencyConfig, *, device: str, context: int | None, exact: bool
) -> dict[str, Any]:
    """Measure decode, prefill, throughput and energy of ``architecture``; the result as plain data."""
    from archsearch.latency.device import resolve_device
    from archsearch.latency.suite import measure_all

    where = resolve_device(device)
    found = measure_all(architecture, config, device=where, context=context, exact=exact, say=say)
    return {"architecture": describe_architecture(architecture), **found.model_dump(mode="json")}


def latency_lines(result: dict[str, Any]) -> list[str]:
    """The result of ``measure`` as text."""
    return [
        _head(result["architecture"]),
        *_decode_lines(result["decode"]),
        *_exact_lines(result["exact"]),
        *_prefill_lines(result["prefill"]),
        *_throughput_lines(result["throughput"]),
        *_energy_lines(result["energy"]),
        *(f"note: {note}" for note in result["notes"]),
    ]


def _decode_lines(decode: dict[str, Any]) -> list[str]:
    interval, where = decode["interval_ms"], decode["device"]["name"]
    sure = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    peak = f", peak {decode['peak_bytes'] / 1e9:.3g} GB" if decode["peak_bytes"] is not None else ""
    kernels = ", ".join(f"{kind} {count}" for kind, count in decode["kernels"].items())
    return [
        f"decode {decode['tokens']:,} tokens at batch {decode['batch']}: {decode['seconds']:.4g} s",
        f"{decode['tpot_ms']:.3f} ms a token{sure} on {where} in {decode['dtype']}",
        f"{decode['floor_fraction']:.1%} of the floor: {decode['floor_ms']:.3g} ms for "
        f"{decode['step_bytes'] / 1e6:,.1f} MB at {decode['bandwidth']['read'] / 1e9:,.0f} GB/s read",
        f"memory: weights {decode['weight_bytes'] / 1e6:,.1f} MB, state {decode['state_bytes'] / 1e6:,.1f} MB{peak}",
        *([f"kernels: {decode['kernels_per_token']} a token ({kernels})"] if kernels else []),
    ]


def _exact_lines(exact: dict[str, Any] | None) -> list[str]:
    if exact is None:
        return []
    return [
        f"exact: {exact['seconds']:.4g} s, {exact['tpot_ms']:.3f} ms a token; {len(exact['runs'])} processes differ by "
        f"{exact['spread']:.2%}, strata are {exact['strata_error']:.2%} off"
    ]


def _prefill_lines(prefill: dict[str, Any]) -> list[str]:
    measured = [f"prefill {p['length']:,} tokens: {p['ms']:,.1f} ms to the first token" for p in prefill["measured"]]
    return measured + [f"prefill {int(length):,} tokens: {why}" for length, why in prefill["omitted"].items()]


def _throughput_lines(throughput: dict[str, Any]) -> list[str]:
    lines = [
        f"batch {b['batch']:,} at {throughput['context']:,} tokens stored: {b['tokens_per_second']:,.0f} tokens/s, "
        f"{b['step_ms']:.3f} ms a step, {b['floor_fraction']:.0%} of the floor"
        for b in throughput["batches"]
    ]
    missing = "no larger batch" if lines else f"no throughput at {throughput['context']:,} tokens stored"
    return [*lines, f"{missing}: {throughput['ended']}"]


def _energy_lines(energy: dict[str, Any] | None) -> list[str]:
    return [f"energy: {energy['joules_per_token']:.3g} J a token at {energy['watts']:.0f} W"] if energy else []


def _head(architecture: dict[str, Any]) -> str:
    return f"{architecture['id']}: {architecture['parameters'] / 1e6:,.2f}M parameters, {architecture['notation']}"
