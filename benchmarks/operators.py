"""Training speed of every operator kind on a GPU: ours, and the same layer of flash-linear-attention, in one run.

One forward and backward of 16,384 tokens under bf16 autocast, eager and replayed from a CUDA graph, as
training replays it. Every kind gets a process, so that kernels compile in parallel; a lock keeps the timed parts
apart. Each row also says how far output and gradients are from the plain-torch reference in fp32.

    python benchmarks/operators.py --json operators.json
    python benchmarks/operators.py --startup --json startup.json

Kernels that both use run with the same shipped configurations; what else theirs use is tuned in full. The
side ``full`` tunes all of ours at each width, which takes minutes, to show what the shipped configurations
cost. ``--startup`` times fresh processes, one a kind and all at once, to the end of their first step: with an
empty cache, and again with what that left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import queue as queues
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.operators import OPERATORS

if TYPE_CHECKING:
    import torch

BATCH, LENGTH = 16, 1024
PEAK_BF16 = 989e12  # dense, data sheets of the H100 SXM and of the H200
LOCK = Path(tempfile.gettempdir()) / "archsearch-benchmark.lock"
KINDS = [kind for kind in OPERATORS if kind != "m"]  # Mamba, the first, needs an extension built


def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """One forward and backward."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.ones_like(y))


def timed(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of ``run``, by device events."""
    import torch

    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def captured(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The step as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer.zero_grad()
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, x)
    return graph.replay


def ours(kind: str, hidden: int) -> torch.nn.Module:
    """Our layer with drawn weights, in fp32 as in training, on the GPU path."""
    import torch

    from archsearch.model.layers import LAYERS

    with torch.device("cuda"):
        layer = LAYERS[kind](OPERATORS[kind](), hidden)
        layer.init_weights(torch.Generator("cuda").manual_seed(0), 0.02)
    layer.path = "fla"
    return layer


def theirs(kind: str, hidden: int) -> torch.nn.Module | None:
    """The same layer of flash-linear-attention, where it has one; its Attention needs flash-attn."""
    from archsearch.model import fla_library

    if kind == "m2" and fla_library.installed("mamba_ssm"):
        fla_library.load("mamba_ssm.ops.triton.ssd_combined")  # whose package cannot be imported without its extension
    import fla.layers
    from fla.modules.mlp import GatedMLP

    from archsearch.model import tuned

    tuned.install()

    heads = hidden // 128
    if kind == "d":
        return fla.layers.DeltaNet(hidden_size=hidden, num_heads=heads, norm_eps=1e-6).cuda()
    if kind == "gd":
        layer = fla.layers.GatedDeltaNet(hidden_size=hidden, head_dim=128, num_heads=heads, expand_v=1, norm_eps=1e-6)
        return layer.cuda()
    if kind == "kda":
        return fla.layers.KimiDeltaAttention(hidden_size=hidden, num_heads=heads, norm_eps=1e-6).cuda()
    if kind == "r7":
        return fla.layers.RWKV7Attention(hidden_size=hidden, layer_idx=0, num_hidden_layers=24).cuda()
    if kind == "hg":
        return fla.layers.HGRN2Attention(hidden_size=hidden, norm_eps=1e-6).cuda()
    if kind == "gl":
        return fla.layers.GatedLinearAttention(hidden_size=hidden, num_heads=hidden // 256, norm_eps=1e-6).cuda()
    if kind == "f":
        return GatedMLP(hidden_size=hidden, intermediate_size=3 * hidden).cuda()
    if kind == "m2" and fla_library.installed("mamba_ssm"):
        sizes = {"num_heads": hidden // 32, "head_dim": 64, "state_size": 128, "expand": 2, "n_groups": 1}
        # in training mode it asks for causal-conv1d's extension; in eval mode it runs its Triton convolution
        return fla.layers.Mamba2(hidden_size=hidden, layer_idx=0, **sizes).cuda().eval()
    if kind in ("a", "w") and fla_library.installed("flash_attn"):
        window = {"window_size": 512} if kind == "w" else {}
        return fla.layers.Attention(hidden_size=hidden, num_heads=heads, **window).cuda()
    return None


def figures(layer: torch.nn.Module, x: torch.Tensor, prefix: str) -> dict[str, float | None]:
    """Time eager and as a graph, and peak memory, of one step."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row: dict[str, float | None] = {f"{prefix}ms": timed(lambda: step(layer, x))}
    row[f"{prefix}memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        row[f"{prefix}graph_ms"] = timed(captured(layer, x))
    except Exception as problem:  # a layer that waits for the device cannot be captured: that is a finding
        print(f"{prefix or 'ours '}no graph: {problem}".splitlines()[0], file=sys.stderr)
        row[f"{prefix}graph_ms"] = None
    return row


def measure(kind: str, hidden: int, side: str) -> dict[str, float | None]:
    """Figures of one layer: ``ours``, ``full`` (ours with kernels tuned in full at this shape) or ``fla``."""
    import torch

    layer = compiled(kind, hidden, side)
    if layer is None:
        return {}
    x = torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True)
    prefix = "" if side == "ours" else f"{side}_"
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return figures(layer, x, prefix)


def compiled(kind: str, hidden: int, side: str) -> torch.nn.Module | None:
    """The layer after its first step."""
    import torch

    layer = theirs(kind, hidden) if side == "fla" else ours(kind, hidden)
    if layer is not None:
        step(layer, torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True))
        torch.cuda.synchronize()
    return layer


def ours_beside(kind: str, hidden: int, row: dict[str, Any]) -> dict[str, Any]:
    """What a row says about our layer beyond its times."""
    import torch

    from archsearch.model.self_check import agreement

    config, tokens = OPERATORS[kind](), BATCH * LENGTH
    found = agreement(config, hidden, torch.device("cuda"), 300)
    flops = 3 * (2 * config.matmul_parameters(hidden) + config.mixing_flops(hidden, LENGTH)) * tokens
    best = min(time for time in (row["ms"], row["graph_ms"]) if time)
    return {
        "path": ours(kind, hidden).implementation,
        "tokens_per_s": tokens / best * 1e3,
        "peak_share": flops / best * 1e3 / PEAK_BF16,
        "error_output": found.errors["output"],
        "error_worst": found.errors[found.worst],
    }


def worker(kind: str, side: str, widths: list[int], queue: Any, start: Any) -> None:
    """Compile and tune all widths of one layer of one side, and measure them when all processes are that far;
    a failure is a finding too.
    """
    if side == "full":
        from archsearch.model import tuned

        tuned.install = lambda: None  # Triton tunes by itself
    for hidden in widths:
        with contextlib.suppress(Exception):  # what fails here fails again below
            compiled(kind, hidden, side)
    queue.put((kind, side, None))
    start.wait()
    for hidden in widths:
        row: dict[str, Any] = {}
        try:
            row = measure(kind, hidden, side)
            if side == "ours":
                row |= ours_beside(kind, hidden, row)
        except Exception as problem:
            row[f"{side}_failed"] = f"{type(problem).__name__}: {problem}"
        queue.put((kind, hidden, row))


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    for name in (name for name in row if name.endswith("failed")):
        print(f"{row['kind']:3} {row['hidden']:5} {name}: {row[name][:300]}", flush=True)
    if row.get("ms") is None:
        return
    number = {name: f"{value:.2f}" for name, value in row.items() if isinstance(value, float)}
    print(
        f"{row['kind']:3} {row['hidden']:5} {row['path']:28} {row['tokens_per_s'] / 1e6:6.2f} Mtok/s"
        f" {number['ms']:>6} ms, graph {number.get('graph_ms', '-'):>6} ms, peak {row['peak_share']:5.1%}"
        f" {row['memory_mib']:5.0f} MiB error {row['error_output']:.0e} worst {row['error_worst']:.0e}"
        f" | over fla.layers {number.get('ratio_ms', '-')}, graph {number.get('ratio_graph_ms', '-')}"
        f" ({number.get('fla_ms', '-')}, {number.get('fla_graph_ms', '-')} ms)"
        f" | over tuned in full {number.get('full_ratio', '-')}",
        flush=True,
    )


def imports() -> dict[str, float]:
    """Seconds that fresh processes with torch take to import the library's layers, and what we use of it."""
    ours_alone = """
from archsearch.model.fla_library import load
for name in ("gla", "delta_rule", "gated_delta_rule", "simple_gla"):
    load(f"fla.ops.{name}.chunk")
"""
    found = {}
    for name, code in (("fla.layers", "import fla.layers"), ("the operators that we use", ours_alone)):
        timing = f"import time, torch\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
        command = [sys.executable, "-W", "ignore", "-c", timing]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.splitlines()[-1])
    return found


def startup_one(kind: str, hidden: int) -> dict[str, Any]:
    """In a fresh process: seconds until torch and archsearch are imported, and until the first step is done."""
    start = time.perf_counter()
    import torch

    imported = time.perf_counter()
    x = torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True)
    context = time.perf_counter()
    step(ours(kind, hidden), x)
    torch.cuda.synchronize()
    end = time.perf_counter()
    return {"kind": kind, "import_s": imported - start, "context_s": context - imported, "first_step_s": end - context}


def startup(kinds: list[str], hidden: int) -> dict[str, Any]:
    """All kinds at once in fresh processes, on an empty cache, then on the one that this left."""
    found: dict[str, Any] = {"hidden": hidden, "imports_s": imports()}
    print("imports after torch: " + ", ".join(f"{name} {value:.1f} s" for name, value in found["imports_s"].items()))
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        for state in ("cold", "warm"):
            start = time.perf_counter()
            commands = [[sys.executable, __file__, "--startup-one", kind, "--hidden", str(hidden)] for kind in kinds]
            running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
            rows = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
            found[state] = {"total_s": time.perf_counter() - start, "kinds": rows}
            print(f"{state}: {found[state]['total_s']:.1f} s in all, hidden {hidden}")
            for row in rows:
                print(
                    "  " + " ".join(f"{k} {v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items()),
                    flush=True,
                )
    return found


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: each side of each kind in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Event()
    jobs = {}
    for kind, side in itertools.product(args.kinds, args.sides):
        jobs[kind, side] = context.Process(target=worker, args=(kind, side, args.hidden, queue, start), daemon=True)
        jobs[kind, side].start()
    late, deadline = set(jobs), time.monotonic() + args.patience
    with contextlib.suppress(queues.Empty):
        while late:
            kind, side, _ = queue.get(timeout=max(0.0, deadline - time.monotonic()))
            late.discard((kind, side))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for kind, side in late:
        jobs[kind, side].terminate()
        for hidden in args.hidden:
            row = rows.setdefault((kind, hidden), {"kind": kind, "hidden": hidden, "sides": 0})
            row |= {f"{side}_failed": f"not compiled after {args.patience} s", "sides": row["sides"] + 1}
    start.set()
    for _ in range((len(jobs) - len(late)) * len(args.hidden)):
        kind, hidden, found = queue.get()
        row = rows.setdefault((kind, hidden), {"kind": kind, "hidden": hidden, "sides": 0})
        row |= {**found, "sides": row["sides"] + 1}
        if row["sides"] == len(args.sides):
            finish(row)
            show(row)
    return list(rows.values())


def finish(row: dict[str, Any]) -> None:
    """Add the ratios: theirs over ours, and how fast ours is beside ours tuned in full."""
    for name in ("ms", "graph_ms"):
        if row.get(name) and row.get(f"fla_{name}"):
            row[f"ratio_{name}"] = row[f"fla_{name}"] / row[name]
    if row.get("graph_ms") and row.get("full_graph_ms"):
        row["full_ratio"] = row["full_graph_ms"] / row["graph_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    sides = ("ours", "fla", "full")
    parser.add_argument("--sides", nargs="+", choices=sides, default=["ours", "fla"], help="what to measure")
    parser.add_argument("--patience", type=float, default=1800, metavar="SECONDS", help="to wait for compilation")
    parser.add_argument("--startup", action="store_true", help="cold and warm start-up instead of speed")
    parser.add_argument("--startup-one", metavar="KIND", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.startup_one:
        print(json.dumps(startup_one(args.startup_one, args.hidden[0])))
        return
    rows: Any = startup(args.kinds, args.hidden[0]) if args.startup else speed(args)
    if args.json:
        import torch

        names = ("torch", "triton", "flash-linear-attention", "fla-core")
        versions = {name: importlib.metadata.version(name) for name in names}
        about = {"device": torch.cuda.get_device_name(), "versions": versions, "batch": BATCH, "length": LENGTH}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
