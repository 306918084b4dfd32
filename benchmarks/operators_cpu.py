"""Training cost of every operator kind on this CPU, over that of attention.

One forward and backward of each layer at the sizes a CPU search trains at. The kinds take turns, so that
a slow moment of the machine hits all of them; the ratio is that of the medians.

    python benchmarks/operators_cpu.py [--json results.json] [--repeats 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from archsearch.model.layers import LAYERS, Layer
from archsearch.operators import OPERATORS

BATCH, LENGTH, HIDDEN = 8, 256, 128
OPTIONS = {
    "a": {"head_dim": 32},
    "w": {"head_dim": 32, "window": 64},
    "m2": {"head_dim": 64, "state": 64},
    "d": {"head_dim": 32},
    "gd": {"head_dim": 32},
    "kda": {"head_dim": 32},
    "gl": {"head_dim": 32},
    "r7": {"head_dim": 32},
    "hg": {"head_dim": 32},
    "f": {},
}


def build(kind: str) -> Layer:
    """The layer of ``kind`` at the benchmark's sizes, with weights drawn."""
    layer = LAYERS[kind](OPERATORS[kind].model_validate(OPTIONS.get(kind, {})), HIDDEN)
    layer.init_weights(torch.Generator().manual_seed(0), 0.02)
    return layer


def seconds(layer: Layer, x: torch.Tensor) -> float:
    """Time of one forward and backward."""
    start = time.perf_counter()
    layer(x).square().mean().backward()
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, float]:
    """Median time of each kind in seconds, from ``repeats`` rounds after two that warm up."""
    layers = {kind: build(kind) for kind in LAYERS}
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounds = [{kind: seconds(layer, x) for kind, layer in layers.items()} for _ in range(repeats + 2)][2:]
    return {kind: statistics.median(times[kind] for times in rounds) for kind in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = measure(args.repeats)
    rows = {kind: {"ms": 1e3 * t, "over_attention": t / times["a"]} for kind, t in times.items()}
    print(
        f"forward + backward, batch {BATCH}, T {LENGTH}, d {HIDDEN}, {args.threads} thread(s), median of {args.repeats}"
    )
    for kind, row in rows.items():
        print(f"  {kind:3} {row['ms']:8.2f} ms  {row['over_attention']:5.2f} x attention")
    if args.json:
        sizes = {"batch": BATCH, "length": LENGTH, "hidden_size": HIDDEN, "options": OPTIONS}
        machine = {"cpu": platform.processor(), "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps({"sizes": sizes, "machine": machine, "operators": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
