"""One architecture by itself: its proxy training and its decode latency."""

from __future__ import annotations

import math
import time
from typing import Any

from archsearch.architecture import Architecture
from archsearch.commands.console import say, stderr
from archsearch.commands.spaces import describe_architecture, duration
from archsearch.config import LatencyConfig, ProxyConfig

SECONDS_A_LINE = 60.0


class TrainingProgress:
    """Tells how a training goes: a live line on a terminal, one line a minute elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = self.last = time.monotonic()
        self.live = stderr().is_terminal and not stderr().is_dumb_terminal

    def __call__(self, tokens: int, loss: float) -> None:
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
    from archsearch.latency.device import resolve_device
    from archsearch.proxy.data import load_corpus
    from archsearch.proxy.trainer import train_proxy

    where = resolve_device(device)
    progress = TrainingProgress(config.tokens)
    try:
        result = train_proxy(architecture, config, seed=seed, device=where, on_progress=progress)
    finally:
        progress.close()
    return {
        "architecture": describe_architecture(architecture),
        "loss": result.loss,
        "perplexity": math.exp(result.loss),
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
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}{bits}",
        f"{result['tokens']:,} tokens trained, {result['tokens_per_second']:,.0f} a second, "
        f"on {result['device']} in {result['dtype']}",
    ]


def measure(architecture: Architecture, config: LatencyConfig, *, device: str) -> dict[str, Any]:
    """Measure the decode latency of ``architecture``; the result as plain data."""
    from archsearch.latency.decode import measure_decode
    from archsearch.latency.device import resolve_device

    found = measure_decode(architecture, config, device=resolve_device(device))
    return {"architecture": describe_architecture(architecture), **found.model_dump(mode="json")}


def latency_lines(result: dict[str, Any]) -> list[str]:
    """The result of ``measure`` as text."""
    interval = result["interval_ms"]
    sure = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    lines = [
        _head(result["architecture"]),
        f"decode {result['tokens']:,} tokens at batch {result['batch']}: {result['seconds']:.4g} s",
        f"{result['tpot_ms']:.3f} ms a token{sure} on {result['device']['name']} in {result['dtype']}",
    ]
    return [*lines, *(f"note: {note}" for note in result["notes"])]


def _head(architecture: dict[str, Any]) -> str:
    return f"{architecture['id']}: {architecture['parameters'] / 1e6:,.2f}M parameters, {architecture['notation']}"
