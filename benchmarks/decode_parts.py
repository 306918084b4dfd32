"""The parts of ``benchmarks/decode.py``: what each measures, and the rows it has."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.config import LatencyConfig
from archsearch.latency.bandwidth import measure_bandwidth
from archsearch.latency.decode import measure_decode
from archsearch.latency.energy import STEPS, measure_energy
from archsearch.latency.exact import measure_exact
from archsearch.latency.prefill import measure_prefill
from archsearch.latency.throughput import measure_throughput
from archsearch.latency.timing import time_steps
from archsearch.latency.watch import watched
from archsearch.model.decode import DecodeGraph
from archsearch.model.hybrid import HybridLM, build_model
from benchmarks.transformers_generate import TOKENS, time_generate

MODELS = ["nemotron-flash-1b", "nemotron-flash-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen2.5-3b", "llama-3.2-1b"]
EXACT = ["nemotron-flash-1b", "qwen3-0.6b"]
BATCHED = ["nemotron-flash-1b", "qwen3-0.6b"]
COMPARED = ["qwen3-0.6b", "qwen3-1.7b"]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
ROOM = 128
"""Tokens behind the longest context."""
SHORT = 128
"""Tokens of the run that stands for a short context."""
OPERATORS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 128, "kv_heads": 2, "qk_norm": True},
    "w": {"head_dim": 128, "kv_heads": 2, "window": 1024},
    "d": {},
    "gd": {},
    "gl": {},
    "m2": {},
    "f": {},
    "kda": {},
    "r7": {},
    "hg": {},
    "m": {},
}
"""The kinds of ``hybrid.yaml`` first."""
WIDTHS = [1024, 2048]
OPERATOR_CONTEXT = 4096
CHAIN_BYTES = 256 * 2**20
SWEPT_COPIES = 32
CUDA = torch.device("cuda", 0)
Row = tuple[dict[str, Any], list[str]]
"""What goes into the record, and what is printed."""


def built(architecture: Architecture) -> HybridLM:
    """With random weights, in bf16."""
    return build_model(architecture, 0, CUDA, torch.bfloat16)


def milliseconds(graph: DecodeGraph, context: int, steps: int, runs: int) -> float:
    """Median milliseconds a step with so many tokens stored."""
    time_steps(graph, context, steps)
    return 1e3 * statistics.median(x for _ in range(runs) for x in time_steps(graph, context, steps).seconds)


def models(name: str, config: LatencyConfig) -> Row:
    """Decode latency of a reference architecture, at a short context too, the sweep over contexts, energy."""
    architecture = load_architecture(name)
    latency = measure_decode(architecture, config, device=CUDA)
    brief = config.model_copy(update={"tokens": SHORT, "strata": 4})
    short = measure_decode(architecture, brief, device=CUDA).tpot_ms
    model = built(architecture)
    graph = DecodeGraph(model, 1, CONTEXTS[-1] + ROOM)
    contexts = {context: milliseconds(graph, context, 16, 2) for context in CONTEXTS}
    graph = DecodeGraph(model, 1, config.tokens)
    energy, problem = measure_energy(graph, config.tokens // 2 - STEPS // 2)
    row = latency.model_dump(mode="json")
    row |= {"short_ms": short, "contexts_ms": contexts, "energy": energy and energy.model_dump()}
    return row, [
        f"{name:20} {latency.tpot_ms:.3f} ms a token, floor {latency.floor_ms:.3f} ms, {latency.floor_fraction:.1%}; "
        f"{latency.kernels_per_token} kernels; first {SHORT}: {short:.3f} ms, 32k: {contexts[32768]:.3f} ms; "
        f"{energy.joules_per_token if energy else math.nan:.3f} J; {'; '.join([*latency.notes, problem])}"
    ]


def chain(hidden: int, kind: str, copies: int) -> tuple[float, int]:
    """Microseconds of a step of ``copies`` operators of one kind, and the kernels of one."""
    operators = [{"kind": kind, **OPERATORS[kind]}] * copies
    architecture = make_architecture(hidden_size=hidden, vocab_size=1024, operators=operators)
    graph = DecodeGraph(built(architecture), 1, 2 * OPERATOR_CONTEXT)
    return 1e3 * milliseconds(graph, OPERATOR_CONTEXT, 24, 7), graph.kernels[kind]


def operators(name: str, config: LatencyConfig) -> Row:
    """What one more operator of a kind adds to a step, and its floor."""
    kind, hidden = name.split()[0], int(name.split()[1])
    one = make_architecture(hidden_size=hidden, vocab_size=1024, operators=[{"kind": kind, **OPERATORS[kind]}])
    operator = one.operators[0]
    weights = (operator.parameters(hidden) + hidden) * 2
    copies = max(16, math.ceil(CHAIN_BYTES / weights))
    (short, kernels), (long, _) = chain(hidden, kind, copies), chain(hidden, kind, 2 * copies)
    us, moved = (long - short) / copies, weights + operator.step_bytes(hidden, OPERATOR_CONTEXT + 1, 2)
    floor = moved / measure_bandwidth(CUDA).read * 1e6
    row = {"us": us, "floor_us": floor, "floor_fraction": floor / us, "kernels": kernels, "copies": copies}
    return row, [f"{name:8} {us:6.2f} us, floor {floor:6.2f} us, {floor / us:.0%}, {kernels} kernels"]


def contexts(name: str, config: LatencyConfig) -> Row:
    """Microseconds an operator of a kind at each context, in a chain; its share of embedding and head is in them."""
    operators = [{"kind": name, **OPERATORS[name]}] * SWEPT_COPIES
    architecture = make_architecture(hidden_size=WIDTHS[0], vocab_size=1024, operators=operators)
    graph = DecodeGraph(built(architecture), 1, CONTEXTS[-1] + ROOM)
    us = {context: 1e3 * milliseconds(graph, context, 16, 3) / SWEPT_COPIES for context in CONTEXTS}
    return {"us": us}, [f"{name:8} " + "  ".join(f"{context}: {one:.2f}" for context, one in us.items())]


def exact(name: str, config: LatencyConfig) -> Row:
    """All tokens in fresh processes."""
    result = measure_exact(load_architecture(name), config, str(CUDA))
    line = f"{name:20} {result.seconds:.3f} s; processes differ by {result.spread:.2%}, strata are "
    return result.model_dump(mode="json"), [line + f"{result.strata_error:.2%} off"]


def throughput(name: str, config: LatencyConfig) -> Row:
    """Doubling batches with 32k tokens stored."""
    model, bandwidth = built(load_architecture(name)), measure_bandwidth(CUDA)
    result, notes = watched(CUDA, "note", lambda: measure_throughput(model, CONTEXTS[-1], bandwidth))
    lines = [
        f"{name:20} batch {one.batch:5}: {one.tokens_per_second:9,.0f} tokens/s, {one.step_ms:.3f} ms a step, "
        f"{one.floor_fraction:.0%} of the floor"
        for one in result.batches
    ]
    return {**result.model_dump(mode="json"), "notes": notes}, [*lines, f"{name:20} {result.ended} {notes or ''}"]


def prefill(name: str, config: LatencyConfig) -> Row:
    """From a prompt to its first token."""
    model = built(load_architecture(name))
    result, notes = watched(CUDA, "note", lambda: measure_prefill(model, 1))
    lines = [
        f"{name:20} {one.length:6} tokens: {one.ms:.2f} ms, {one.tokens_per_second:9,.0f} tokens/s"
        for one in result.measured
    ]
    told = f"{name:20} {result.paths}, {result.errors} {result.omitted or ''} {notes or ''}"
    return {**result.model_dump(mode="json"), "notes": notes}, [*lines, told]


def transformers(name: str, config: LatencyConfig) -> Row:
    """The same shapes through transformers' own ``generate``, and through ours over as many tokens."""
    architecture = load_architecture(name)
    theirs = time_generate(architecture, CUDA)
    torch.cuda.empty_cache()
    ours = measure_decode(architecture, config.model_copy(update={"tokens": TOKENS}), device=CUDA)
    ratio = theirs["steady_ms"] / ours.tpot_ms
    line = f"{name:20} transformers {theirs['steady_ms']:.3f} ms a token ({theirs['whole_ms']:.3f} with its start), "
    row = {**theirs, "ours_ms": ours.tpot_ms, "floor_ms": ours.floor_ms, "ratio": ratio}
    return row, [line + f"ours {ours.tpot_ms:.3f} ms, floor {ours.floor_ms:.3f} ms, {ratio:.2f}x"]


PARTS: dict[str, tuple[Callable[[str, LatencyConfig], Row], list[str]]] = {
    "models": (models, MODELS),
    "operators": (operators, [f"{kind} {hidden}" for hidden in WIDTHS for kind in OPERATORS]),
    "contexts": (contexts, list(OPERATORS)),
    "exact": (exact, EXACT),
    "throughput": (throughput, BATCHED),
    "prefill": (prefill, MODELS),
    "transformers": (transformers, COMPARED),
}
"""What measures a row, and the names of the usual rows."""
