"""Training speed of every operator kind on a GPU: ours, and the same layer of flash-linear-attention, in one run.

One forward and backward of 16,384 tokens under bf16 autocast, eager and replayed from a CUDA graph, as
training replays it. Every layer gets a process, so that kernels compile in parallel; when all have compiled they
are measured one after the other. Each row also says how far output and gradients are from the reference in fp32.

    python benchmarks/operators.py --json operators.json
    python benchmarks/operators.py --startup --json startup.json

Kernels that both use run with the same shipped configurations; what else theirs use is tuned in full. Its
Attention wants the package flash-attn: it is given the same kernels (FlashAttention-2) out of torch instead. Its Mamba
and Mamba2 run in eval mode, since in training mode they want causal-conv1d's extension. The side ``full``
tunes all kernels of ours at each width, which takes minutes, to show what the shipped configurations cost; what it
chose is kept under ``--choices``, so that a later run takes the times alone.
``--startup`` times fresh processes, one a kind and all at once, to the end of their first step: with an empty
cache, and again with what that left.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import queue as queues
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archsearch.files import write_atomic
from archsearch.operators import OPERATORS
from benchmarks.operator_layers import BATCH, LENGTH, figures, ours, step, theirs, wake_autograd
from benchmarks.operator_startup import startup, startup_one

if TYPE_CHECKING:
    import torch

PEAK_BF16 = 989e12  # dense, data sheets of the H100 SXM and of the H200
LOCK = Path(tempfile.gettempdir()) / "archsearch-benchmark.lock"
KINDS = [kind for kind in OPERATORS if kind != "m" or importlib.util.find_spec("selective_scan_cuda")]
SIDES = ("ours", "fla", "full")
IMPORTED_ONCE = ["torch._dynamo", "torch._inductor.compile_fx"]
"""Most of the seconds that ``import fla.layers`` takes; importing them starts nothing on the GPU."""

Job = tuple[str, str, int]
"""Kind, side and width."""


def compiled(kind: str, side: str, hidden: int, choices: Path | None) -> torch.nn.Module | None:
    """The layer after its first step."""
    import torch

    kept = None if side != "full" or choices is None else choices / f"{kind}-{hidden}.json"
    if side == "full":
        from archsearch.model import tuned

        if kept is not None and kept.exists():  # what an earlier run chose, and nothing else
            tuned.known_files = lambda: [kept]
        else:
            tuned.Choice.tuning, tuned.MANY = True, sys.maxsize
    wake_autograd()
    layer = theirs(kind, hidden) if side == "fla" else ours(kind, hidden)
    if layer is not None:
        step(layer, torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True))
        layer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if kept is not None and not kept.exists():
        tuned.write(kept, tuned.chosen())
    return layer


def beside(kind: str, hidden: int) -> dict[str, Any]:
    """What a row says about our layer beyond its times."""
    import torch

    from archsearch.model.self_check import agreement

    config = OPERATORS[kind]()
    found = agreement(config, hidden, torch.device("cuda"), 300)
    torch.cuda.empty_cache()
    flops = 3 * (2 * config.matmul_parameters(hidden) + config.mixing_flops(hidden, LENGTH)) * BATCH * LENGTH
    errors = {"error_output": found.errors["output"], "error_worst": found.errors[found.worst]}
    return {"path": ours(kind, hidden).implementation, "flops": flops, **errors}


def worker(job: Job, choices: Path | None, queue: Any, slots: Any, start: Any) -> None:
    """Compile one layer, and measure it when all processes are that far; a failure is a finding too."""
    kind, side, hidden = job
    row: dict[str, Any] = {}
    prefix = "" if side == "ours" else f"{side}_"
    try:
        with slots:  # no more than there are cores: all at once would not fit the GPU's memory
            begin = time.perf_counter()
            layer = compiled(kind, side, hidden, choices)
            row[f"{prefix}compile_s"] = time.perf_counter() - begin
            row |= beside(kind, hidden) if side == "ours" else {}
        queue.put((job, None))
        start.wait()
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = {} if layer is None else figures(layer, hidden)
        row |= {f"{prefix}{name}": value for name, value in found.items()}
    except Exception as problem:
        row[f"{prefix}failed"] = f"{type(problem).__name__}: {problem}"
    queue.put((job, row))


def finish(row: dict[str, Any]) -> None:
    """Add rates, the ratios of their times over ours, and how fast ours is beside ours tuned in full."""
    best = min((row[name] for name in ("ms", "graph_ms") if row.get(name)), default=None)
    if best:
        row["tokens_per_s"] = BATCH * LENGTH / best * 1e3
        row["peak_share"] = row["flops"] / best * 1e3 / PEAK_BF16
    for name in ("ms", "graph_ms"):
        if row.get(name) and row.get(f"fla_{name}"):
            row[f"ratio_{name}"] = row[f"fla_{name}"] / row[name]
    if row.get("graph_ms") and row.get("full_graph_ms"):
        row["full_ratio"] = row["full_graph_ms"] / row["graph_ms"]


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    for name in (name for name in row if name.endswith(("failed", "no_graph"))):
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


def processes() -> Any:
    """How processes are made: forked from one that has imported most of it, where forks of that can use the GPU."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks the driver's library, and not CUDA, whether there is one
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    first = context.Process(target=wake_autograd, daemon=True)
    first.start()
    first.join(60)
    if first.exitcode == 0:
        return context
    print("forked processes cannot use the GPU: each imports everything anew", flush=True)
    first.kill()
    return multiprocessing.get_context("spawn")


def speed(args: argparse.Namespace, save: Callable[[Any], None]) -> None:
    """Measure all layers; every row is printed, and all so far are saved, as soon as its sides are there."""
    context = processes()
    queue, start, begin = context.Queue(), context.Event(), time.perf_counter()
    slots = context.Semaphore(len(os.sched_getaffinity(0)))
    jobs: list[Job] = list(itertools.product(args.kinds, args.sides, args.hidden))
    shared = args.choices, queue, slots, start
    running = {job: context.Process(target=worker, args=(job, *shared), daemon=True) for job in jobs}
    for process in running.values():
        process.start()
    rows = {(kind, hidden): {"kind": kind, "hidden": hidden} for kind in args.kinds for hidden in args.hidden}
    waiting, measured = set(jobs), set(jobs)

    def done(job: Job, found: dict[str, Any]) -> None:
        waiting.discard(job)
        measured.discard(job)
        kind, _, hidden = job
        row = rows[kind, hidden]
        row |= found
        if not any((kind, side, hidden) in measured for side in args.sides):
            finish(row)
            show(row)
        save([row for row in rows.values() if len(row) > 2])

    while measured:
        late = waiting if time.perf_counter() - begin > args.patience and not start.is_set() else set()
        ended = {job for job in measured if not running[job].is_alive()}
        # what a process sent before it ended is read first
        for job in sorted(ended | late if queue.empty() else late):
            reason = f"not compiled after {args.patience:.0f} s" if job in late else "the process died"
            running[job].terminate()
            done(job, {f"{job[1]}_failed": reason})
        if not waiting and not start.is_set():
            print(f"{len(measured)} layers compiled in {time.perf_counter() - begin:.0f} s", flush=True)
            start.set()
        try:
            job, found = queue.get(timeout=1)
        except queues.Empty:
            continue
        if found is None:
            waiting.discard(job)
        elif job in measured:
            done(job, found)


@functools.cache
def about() -> dict[str, Any]:
    """What every record says of its run."""
    import torch

    names = ("torch", "triton", "flash-linear-attention", "fla-core", "mamba-ssm")
    installed = {found.name for found in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in names if {name, name.replace("-", "_")} & installed}
    attention = "its Attention on torch's FlashAttention-2 kernels; its Mamba and Mamba2 in eval mode"
    return {
        "device": torch.cuda.get_device_name(), "versions": versions, "batch": BATCH, "length": LENGTH,
        "fla_layers": attention,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(OPERATORS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "fla"], help="what to measure")
    parser.add_argument("--patience", type=float, default=1800, metavar="SECONDS", help="to wait for compilation")
    parser.add_argument("--choices", type=Path, metavar="FOLDER", help="where the side full keeps what it chose")
    parser.add_argument("--startup", action="store_true", help="cold and warm start-up instead of speed")
    parser.add_argument("--startup-one", metavar="KIND", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.startup_one:
        print(json.dumps(startup_one(args.startup_one, args.hidden[0])))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes as well
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or every process would start a pool of them

    def save(rows: Any) -> None:
        if args.json:
            write_atomic(args.json, json.dumps({**about(), "rows": rows}, indent=2) + "\n")

    if args.startup:
        save(startup(args.kinds, args.hidden[0]))
    else:
        speed(args, save)


if __name__ == "__main__":
    main()
