"""Decode latency against the bandwidth floor, on one CUDA device.

    python -m benchmarks.decode --out experiments/decode-h200

For each reference architecture: milliseconds a token for 8192 tokens at batch 1 (the step time at the middle of 16
equal strata of positions, 64 advancing steps each), the floor (``Architecture.step_bytes`` over the bandwidth that
a reading kernel reaches in the same process), and the step time against the context. For each operator kind: the
cost of one more operator in a chain of them, from N and 2 N copies with weights of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import triton

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.latency.bandwidth import measure_bandwidth
from archsearch.model.decode import DecodeGraph, DecodePlan
from archsearch.model.hybrid import build_model

matplotlib.use("agg")
from matplotlib import pyplot

MODELS = ["nemotron-flash-1b", "nemotron-flash-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen2.5-3b", "llama-3.2-1b"]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
STRATA, STEPS = 16, 64
OPERATORS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 128, "kv_heads": 2, "qk_norm": True},
    "w": {"head_dim": 128, "kv_heads": 2, "window": 1024},
    "d": {},
    "gd": {},
    "gl": {},
    "m2": {},
    "f": {},
}
OPERATOR_CONTEXT = 4096
CHAIN_BYTES = 256 * 2**20


def milliseconds(run: Callable[[], None], count: int) -> float:
    """Device time of ``count`` runs, a run."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def decode(graph: DecodeGraph, architecture: Architecture, tokens: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds a token and the floor, both the mean over the strata of ``tokens`` tokens."""
    width, times, floors = tokens / STRATA, [], []
    for index in range(STRATA):
        start = int(index * width + (width - STEPS) / 2)
        graph.seek(start - 3)
        milliseconds(graph.step, 3)
        times.append(milliseconds(graph.step, STEPS))
        floors.append(architecture.step_bytes(start + STEPS // 2 + 1) / bandwidth * 1e3)
    graph.plan.check()
    ms, floor = statistics.mean(times), statistics.mean(floors)
    return {"ms": ms, "seconds": ms * tokens * 1e-3, "floor_ms": floor, "floor_fraction": floor / ms}


def contexts(graph: DecodeGraph) -> dict[int, float]:
    """Milliseconds a token with so many tokens stored."""
    found = {}
    for context in CONTEXTS:
        graph.seek(context)
        milliseconds(graph.step, 3)
        found[context] = min(milliseconds(graph.step, 20) for _ in range(3))
    return found


def measure_model(name: str, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Decode latency, floor and context sweep of a reference architecture with random weights."""
    architecture = load_architecture(name)
    model = build_model(architecture, 0, "cuda", torch.bfloat16)
    graph = DecodeGraph(model, 1, max(tokens, CONTEXTS[-1]) + 2 * STEPS)
    result: dict[str, Any] = decode(graph, architecture, tokens, bandwidth)
    result |= {"kernels_per_token": graph.plan.kernels_per_token, "kernels": graph.plan.kernels}
    result["contexts_ms"] = contexts(graph)
    result["finite"] = bool(torch.isfinite(graph.logits).all())
    return result


def chain_microseconds(hidden: int, kind: str, copies: int) -> tuple[float, DecodePlan]:
    """Time of a step of ``copies`` operators of one kind."""
    fields = {"hidden_size": hidden, "vocab_size": 1024, "operators": [{"kind": kind, **OPERATORS[kind]}] * copies}
    graph = DecodeGraph(build_model(make_architecture(**fields), 0, "cuda", torch.bfloat16), 1, 2 * OPERATOR_CONTEXT)
    graph.seek(OPERATOR_CONTEXT)
    milliseconds(graph.step, 5)
    return statistics.median(milliseconds(graph.step, 20) for _ in range(7)) * 1e3, graph.plan


def measure_operator(hidden: int, kind: str, bandwidth: float) -> dict[str, float]:
    """Microseconds that one more operator adds to a step, and its floor."""
    one = make_architecture(hidden_size=hidden, vocab_size=1024, operators=[{"kind": kind, **OPERATORS[kind]}])
    operator = one.operators[0]
    weights = (operator.parameters(hidden) + hidden) * 2
    copies = max(16, math.ceil(CHAIN_BYTES / weights))
    (short, plan), (long, _) = chain_microseconds(hidden, kind, copies), chain_microseconds(hidden, kind, 2 * copies)
    us = (long - short) / copies
    floor = (weights + operator.step_bytes(hidden, OPERATOR_CONTEXT + 1, 2)) / bandwidth * 1e6
    return {"us": us, "floor_us": floor, "floor_fraction": floor / us, "kernels": plan.kernels[kind], "copies": copies}


def plot(result: dict[str, Any], path: Path) -> None:
    """Floor fractions, step time against context, operators against their floor."""
    _, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    models, operators = result["models"], result["operators"]
    left.barh(list(models), [m["floor_fraction"] for m in models.values()])
    left.set(xlim=(0, 1), xlabel="floor / measured", title=f"decode of {result['tokens']} tokens, batch 1")
    for name, model in models.items():
        middle.plot(list(model["contexts_ms"]), list(model["contexts_ms"].values()), marker=".", label=name)
    middle.set(xscale="log", xlabel="tokens stored", ylabel="ms a token", ylim=(0, None), title="step time")
    middle.legend(fontsize=8)
    names = list(operators)
    right.barh(names, [o["us"] for o in operators.values()], label="measured")
    right.barh(names, [o["floor_us"] for o in operators.values()], label="floor")
    right.set(xlabel="µs an operator", title=f"one operator, {OPERATOR_CONTEXT} tokens stored")
    right.legend()
    pyplot.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--widths", nargs="*", type=int, default=[1024, 2048], help="of the operators; none to skip")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = measure_bandwidth(torch.device("cuda")).read
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s read", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "bandwidth": bandwidth, "tokens": options.tokens, "models": {}, "operators": {},
    }  # fmt: skip
    with torch.inference_mode():
        for name in options.models:
            found = result["models"][name] = measure_model(name, options.tokens, bandwidth)
            print(
                f"{name:20} {found['ms']:.3f} ms a token, floor {found['floor_ms']:.3f} ms, "
                f"{found['floor_fraction']:.0%}; {found['kernels_per_token']} kernels; "
                f"128: {found['contexts_ms'][128]:.3f} ms, 32k: {found['contexts_ms'][32768]:.3f} ms",
                flush=True,
            )
        for width in options.widths:
            for kind in OPERATORS:
                found = result["operators"][f"{kind} {width}"] = measure_operator(width, kind, bandwidth)
                print(
                    f"{kind:3} {width}: {found['us']:6.2f} us, floor {found['floor_us']:6.2f} us, "
                    f"{found['floor_fraction']:.0%}, {found['kernels']} kernels",
                    flush=True,
                )
    (options.out / "decode.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    plot(result, options.out / "decode.png")


if __name__ == "__main__":
    main()
