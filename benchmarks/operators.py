"""Training speed of every operator kind on a GPU: ours, and the same layer of flash-linear-attention, in one run.

One forward and backward of 16,384 tokens under bf16 autocast. Every kind gets a process, so that kernels
are compiled and tuned in parallel; a lock keeps the timed parts apart. Each row also says how far output
and gradients are from the plain-torch reference in fp32.

    python benchmarks/operators.py --hidden 512 1024 2048 --json operators.json
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from archsearch.model.layers import LAYERS, Layer
from archsearch.operators import OPERATORS

BATCH, LENGTH = 16, 1024
PEAK_BF16 = 989e12  # dense, H100 and H200 data sheets
LOCK = Path(tempfile.gettempdir()) / "archsearch-benchmark.lock"


def step(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One forward and backward; gives the output."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.ones_like(y) / y.numel() ** 0.5)
    return y.detach()


def timed(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of ``run``, by device events."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def build(kind: str, hidden: int, path: str) -> Layer:
    """The layer of ``kind`` with drawn weights, in fp32 as in training."""
    with torch.device("cuda"):
        layer = LAYERS[kind](OPERATORS[kind](), hidden)
        layer.init_weights(torch.Generator("cuda").manual_seed(0), 0.02)
    layer.path = path
    return layer


def theirs(kind: str, hidden: int) -> torch.nn.Module | None:
    """The same layer of flash-linear-attention, where it has one that runs without further libraries."""
    from fla.layers import GatedDeltaNet, GatedLinearAttention
    from fla.layers.delta_net import DeltaNet

    if kind == "d":
        return DeltaNet(hidden_size=hidden, num_heads=hidden // 128, norm_eps=1e-6)
    if kind == "gd":
        return GatedDeltaNet(hidden_size=hidden, head_dim=128, num_heads=hidden // 128, expand_v=1, norm_eps=1e-6)
    if kind == "gl":
        return GatedLinearAttention(hidden_size=hidden, num_heads=hidden // 256, norm_eps=1e-6)
    return None


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def agreement(kind: str, hidden: int, path: str) -> dict[str, float]:
    """Relative errors of the output and of every gradient against the fp32 reference on a short batch."""
    x = torch.randn(2, 300, hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    found: list[dict[str, torch.Tensor]] = []
    for layer_path, enabled in ((path, True), ("torch", False)):
        layer, inputs = build(kind, hidden, layer_path), x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            y = layer(inputs)
        y.float().backward(torch.cos(torch.arange(y.numel(), device="cuda").view_as(y).float()))
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"output": y.detach(), "input": inputs.grad, **grads})
    return {name: error(found[0][name], truth) for name, truth in found[1].items()}


def measure(kind: str, hidden: int, path: str) -> dict[str, Any]:
    """One row of the table."""
    layer = build(kind, hidden, path)
    x = torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True)
    start = time.perf_counter()
    step(layer, x)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"kind": kind, "hidden": hidden, "path": path, "first_step_s": time.perf_counter() - start}
    other = theirs(kind, hidden) if path == "fla" else None
    if other is not None:
        other = other.cuda()
        step(other, x)
    errors = agreement(kind, hidden, path)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.reset_peak_memory_stats()
        row["ms"] = 1e3 * timed(lambda: step(layer, x))
        row["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        row["fla_ms"] = None if other is None else 1e3 * timed(lambda: step(other, x))
    config, tokens = OPERATORS[kind](), BATCH * LENGTH
    flops = 3 * (2 * config.matmul_parameters(hidden) + config.mixing_flops(hidden, LENGTH)) * tokens
    row |= {"tokens_per_s": tokens / row["ms"] * 1e3, "peak_share": flops / row["ms"] * 1e3 / PEAK_BF16}
    row["ratio"] = row["fla_ms"] and row["fla_ms"] / row["ms"]
    worst = max(errors, key=lambda name: errors[name])
    return {**row, "error_output": errors["output"], "error_worst": errors[worst], "worst": worst}


def worker(kind: str, widths: list[int], path: str, queue: Any) -> None:
    """Measure all widths of one kind; a failure is a row too."""
    for hidden in widths:
        try:
            queue.put(measure(kind, hidden, path))
        except Exception as problem:
            queue.put({"kind": kind, "hidden": hidden, "path": path, "failed": f"{type(problem).__name__}: {problem}"})


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    if "failed" in row:
        print(f"{row['kind']:3} {row['hidden']:5} {row['path']:6} FAILED {row['failed'][:160]}", flush=True)
        return
    ratio = f"{row['ratio']:.2f}x fla.layers" if row["ratio"] else ""
    print(
        f"{row['kind']:3} {row['hidden']:5} {row['path']:6} {row['ms']:8.2f} ms {row['tokens_per_s'] / 1e6:6.2f} Mtok/s"
        f" peak {row['peak_share']:5.1%} {row['memory_mib']:7.0f} MiB first {row['first_step_s']:6.1f} s"
        f" error {row['error_output']:.1e} worst {row['error_worst']:.1e} ({row['worst']}) {ratio}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--kinds", nargs="+", default=list(LAYERS))
    parser.add_argument("--paths", nargs="+", default=["fla"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    jobs = [(kind, path) for kind in args.kinds for path in args.paths]
    for kind, path in jobs:
        context.Process(target=worker, args=(kind, args.hidden, path, queue), daemon=True).start()
    rows = []
    for _ in range(len(jobs) * len(args.hidden)):
        rows.append(queue.get())
        show(rows[-1])
    if args.json:
        versions = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
        for name in ("triton", "fla"):
            versions[name] = __import__(name).__version__
        sizes = {"batch": BATCH, "length": LENGTH}
        args.json.write_text(json.dumps({"versions": versions, "sizes": sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
