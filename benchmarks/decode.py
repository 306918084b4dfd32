"""Decode latency against the bandwidth floor, on one CUDA device. Each part can be run by itself; all go to one file.

    python -m benchmarks.decode --out experiments/decode-h100 models operators exact throughput transformers

models: ``measure_decode`` of each reference architecture, and its step time at 128 to 32k tokens stored.
operators: the cost of one more operator of each kind in a chain, from N and 2 N copies with weights of their own.
exact: all tokens in three fresh processes, against each other and against the strata.
throughput: batches doubled to the memory limit with 32k tokens stored in each sequence.
transformers: ``generate`` with a static cache and compilation, the same shapes, in the same process as ours.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.config import LatencyConfig
from archsearch.latency.bandwidth import measure_bandwidth
from archsearch.latency.decode import measure_decode
from archsearch.latency.exact import measure_exact
from archsearch.latency.throughput import measure_throughput
from archsearch.latency.timing import time_steps
from archsearch.model.decode import DecodeGraph
from archsearch.model.hybrid import build_model

MODELS = ["nemotron-flash-1b", "nemotron-flash-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen2.5-3b", "llama-3.2-1b"]
EXACT = ["nemotron-flash-1b", "qwen3-0.6b"]
BATCHED = ["nemotron-flash-1b", "qwen3-0.6b"]
COMPARED = ["qwen3-0.6b", "qwen3-1.7b"]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
SHORT = 128
"""Tokens of the run that stands for a short context."""
OPERATORS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 128, "kv_heads": 2, "qk_norm": True},
    "w": {"head_dim": 128, "kv_heads": 2, "window": 1024},
    "d": {},
    "gd": {},
    "kda": {},
    "gl": {},
    "r7": {},
    "hg": {},
    "m": {},
    "m2": {},
    "f": {},
}
WIDTHS = [1024, 2048]
OPERATOR_CONTEXT = 4096
CHAIN_BYTES = 256 * 2**20
GENERATED = 512
"""Tokens that transformers generates, and we beside it."""
CUDA = torch.device("cuda", 0)
Part = Iterator[tuple[str, dict[str, Any]]]


def milliseconds(graph: DecodeGraph, context: int, steps: int, runs: int) -> float:
    """Median milliseconds a step with so many tokens stored."""
    time_steps(graph, context, steps)
    return 1e3 * statistics.median(x for _ in range(runs) for x in time_steps(graph, context, steps).seconds)


def models(names: list[str], config: LatencyConfig) -> Part:
    """Decode latency of each reference architecture, at a short context too, and the sweep over contexts."""
    for name in names or MODELS:
        architecture = load_architecture(name)
        latency = measure_decode(architecture, config, device=CUDA)
        graph = DecodeGraph(build_model(architecture, 0, CUDA, torch.bfloat16), 1, CONTEXTS[-1] + 128)
        contexts = {context: milliseconds(graph, context, 16, 2) for context in CONTEXTS}
        del graph
        short = measure_decode(
            architecture, config.model_copy(update={"tokens": SHORT, "strata": 4}), device=CUDA
        ).tpot_ms
        torch.cuda.empty_cache()
        yield name, {"short_ms": short, "contexts_ms": contexts, **latency.model_dump(mode="json")}
        print(
            f"{name:20} {latency.tpot_ms:.3f} ms a token, floor {latency.floor_ms:.3f} ms, "
            f"{latency.floor_fraction:.1%}; {latency.kernels_per_token} kernels; first {SHORT}: {short:.3f} ms, "
            f"32k: {contexts[32768]:.3f} ms; {'; '.join(latency.notes)}",
            flush=True,
        )


def chain(hidden: int, kind: str, copies: int) -> tuple[float, int]:
    """Microseconds of a step of ``copies`` operators of one kind, and the kernels of one."""
    operators = [{"kind": kind, **OPERATORS[kind]}] * copies
    architecture = make_architecture(hidden_size=hidden, vocab_size=1024, operators=operators)
    graph = DecodeGraph(build_model(architecture, 0, CUDA, torch.bfloat16), 1, 2 * OPERATOR_CONTEXT)
    return 1e3 * milliseconds(graph, OPERATOR_CONTEXT, 24, 7), graph.kernels[kind]


def operators(names: list[str], config: LatencyConfig) -> Part:
    """What one more operator of each kind adds to a step, and its floor."""
    for hidden in WIDTHS:
        for kind in names or OPERATORS:
            one = make_architecture(hidden_size=hidden, vocab_size=1024, operators=[{"kind": kind, **OPERATORS[kind]}])
            operator = one.operators[0]
            weights = (operator.parameters(hidden) + hidden) * 2
            copies = max(16, math.ceil(CHAIN_BYTES / weights))
            (short, kernels), (long, _) = chain(hidden, kind, copies), chain(hidden, kind, 2 * copies)
            us, moved = (long - short) / copies, weights + operator.step_bytes(hidden, OPERATOR_CONTEXT + 1, 2)
            floor = moved / measure_bandwidth(CUDA).read * 1e6
            yield (
                f"{kind} {hidden}",
                {"us": us, "floor_us": floor, "floor_fraction": floor / us, "kernels": kernels, "copies": copies},
            )
            print(
                f"{kind:3} {hidden}: {us:6.2f} us, floor {floor:6.2f} us, {floor / us:.0%}, {kernels} kernels",
                flush=True,
            )
            torch.cuda.empty_cache()


def exact(names: list[str], config: LatencyConfig) -> Part:
    """All tokens in fresh processes."""
    for name in names or EXACT:
        result = measure_exact(load_architecture(name), config, str(CUDA))
        yield name, result.model_dump(mode="json")
        print(
            f"{name:20} {result.seconds:.3f} s; processes differ by {result.spread:.2%}, strata are "
            f"{result.strata_error:.2%} off",
            flush=True,
        )


def throughput(names: list[str], config: LatencyConfig) -> Part:
    """Doubling batches with 32k tokens stored."""
    for name in names or BATCHED:
        model = build_model(load_architecture(name), 0, CUDA, torch.bfloat16)
        result = measure_throughput(model, CONTEXTS[-1], measure_bandwidth(CUDA))
        del model
        yield name, result.model_dump(mode="json")
        for one in result.batches:
            print(
                f"{name:20} batch {one.batch:5}: {one.tokens_per_second:9,.0f} tokens/s, {one.step_ms:.3f} ms a step, "
                f"{one.floor_fraction:.0%} of the floor",
                flush=True,
            )
        print(f"{name:20} {result.ended}", flush=True)


def transformers(names: list[str], config: LatencyConfig) -> Part:
    """The same shapes through transformers' own ``generate``, and through ours over as many tokens."""
    for name in names or COMPARED:
        architecture = load_architecture(name)
        theirs = generate_ms(architecture)
        ours = measure_decode(architecture, config.model_copy(update={"tokens": GENERATED}), device=CUDA).tpot_ms
        yield name, {"tokens": GENERATED, "transformers_ms": theirs, "ours_ms": ours, "ratio": theirs / ours}
        print(f"{name:20} transformers {theirs:.3f} ms a token, ours {ours:.3f} ms, {theirs / ours:.2f}x", flush=True)


def generate_ms(architecture: Architecture) -> float:
    """Milliseconds a token of ``generate`` with a static cache, compiled by transformers itself, best of three runs."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    attention, ffn = architecture.operators[:2]
    shape = Qwen3Config(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=ffn.inner(architecture.hidden_size),
        num_hidden_layers=len(architecture.operators) // 2,
        num_attention_heads=attention.query_heads(architecture.hidden_size),
        num_key_value_heads=attention.stored_heads(architecture.hidden_size),
        head_dim=attention.head_dim,
        tie_word_embeddings=architecture.tie_embeddings,
    )
    with torch.device(CUDA):
        model = Qwen3ForCausalLM(shape).to(torch.bfloat16).eval()
    assert sum(p.numel() for p in model.parameters()) == architecture.parameters
    prompt = torch.ones(1, 1, dtype=torch.int64, device=CUDA)
    options = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None, "pad_token_id": 0}
    taken = []
    with torch.no_grad():
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            out = model.generate(prompt, max_new_tokens=GENERATED, min_new_tokens=GENERATED, **options)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - begun) / GENERATED)
            assert out.shape[1] == GENERATED + 1
    del model
    torch.cuda.empty_cache()
    return 1e3 * min(taken[2:])


PARTS: dict[str, Callable[[list[str], LatencyConfig], Part]] = {
    "models": models, "operators": operators, "exact": exact, "throughput": throughput, "transformers": transformers
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--names", nargs="*", default=[], help="of models, or of operator kinds; all of a part if absent"
    )
    parser.add_argument("--others", default="refuse", help="refuse or note: other processes on the GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    path, config = options.out / "decode.json", LatencyConfig(others=options.others, repeats=2)
    for part in options.parts:
        begun = time.perf_counter()
        with torch.inference_mode(part != "transformers"):  # its compiler has trouble with that mode
            for name, found in PARTS[part](options.names, config):
                save(path, part, name, found)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)


def save(path: Path, part: str, name: str, found: dict[str, Any]) -> None:
    """Add a result to the record, which may hold those of earlier runs."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record["device"] = torch.cuda.get_device_name()
    record.setdefault(part, {})[name] = found
    path.write_text(json.dumps(record, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
