"""How long operators take from a fresh process to their first training step: ``operators.py --startup``."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.operator_layers import BATCH, LENGTH, ours, wake_autograd

if TYPE_CHECKING:
    import torch

OURS_ALONE = """
from archsearch.model.fla_library import load
for name in ("gla", "delta_rule", "gated_delta_rule", "kda", "rwkv7"):
    load(f"fla.ops.{name}.chunk")
"""


def startup(kinds: list[str], hidden: int) -> dict[str, Any]:
    """All kinds at once in fresh processes, on an empty cache, then on the one that this left."""
    found: dict[str, Any] = {"hidden": hidden, "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as cache:
        # neither kernels that were compiled before nor configurations that were tuned on this machine
        environment = {**plain_environment(), "TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        for state in ("cold", "warm"):
            start = time.perf_counter()
            commands = [[sys.executable, sys.argv[0], "--startup-one", k, "--hidden", str(hidden)] for k in kinds]
            running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
            rows = [_result(kind, process) for kind, process in zip(kinds, running, strict=True)]
            found[state] = {"total_s": time.perf_counter() - start, "kinds": rows}
            print(f"{state}: {found[state]['total_s']:.1f} s in all, width {hidden}")
            for row in rows:
                print("  " + " ".join(f"{k} {v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items()))
    found["imports_s"] = imports()
    print("imports after torch: " + ", ".join(f"{name} {value:.1f} s" for name, value in found["imports_s"].items()))
    return found


def plain_environment() -> dict[str, str]:
    """This process's, in which Python keeps what it compiles, as it does unless told otherwise."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"OMP_NUM_THREADS": "1"}


def _result(kind: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    lines = process.communicate()[0].splitlines()
    if process.returncode:
        return {"kind": kind, "failed": f"exit code {process.returncode}"}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def first_step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """One forward and backward of a scalar, as a loss is: for a gradient that is handed in torch imports sympy."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        y = layer(x)
    y.float().sum().backward()


def startup_one(kind: str, hidden: int) -> dict[str, Any]:
    """In a fresh process: seconds that imports take, that the device takes to answer, and that the first step takes.

    ``ready_s`` is all that follows torch's import: the device, our and the libraries' modules, the first step.
    """
    start = time.perf_counter()
    import torch

    imported = time.perf_counter()
    with importing() as modules:
        x = torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True)
        wake_autograd()
        torch.cuda.synchronize()
        context = time.perf_counter()
        first_step(ours(kind, hidden), x)
        torch.cuda.synchronize()
    end = time.perf_counter()
    tuner = sys.modules.get("archsearch.model.tuned")
    tuned = sorted(tuner.Choice.missed) if tuner else []
    return {
        "kind": kind, "torch_s": imported - start, "ready_s": end - imported, "context_s": context - imported,
        "modules_s": sum(modules), "first_step_s": end - context - sum(modules), "tuned_here": tuned,
    }  # fmt: skip


@contextmanager
def importing() -> Iterator[list[float]]:
    """Collect the seconds of every import within, those inside of others not counted again."""
    found: list[float] = []
    plain = builtins.__import__, importlib.import_module
    inside = False

    def timed(load: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return load(*args, **kwargs)
            inside, start = True, time.perf_counter()
            try:
                return load(*args, **kwargs)
            finally:
                inside = False
                found.append(time.perf_counter() - start)

        return call

    builtins.__import__, importlib.import_module = timed(plain[0]), timed(plain[1])
    try:
        yield found
    finally:
        builtins.__import__, importlib.import_module = plain


def imports() -> dict[str, float]:
    """Seconds that fresh processes with torch take to import the library's layers, and what we use of it."""
    environment = {
        **plain_environment(),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]]),
    }
    running = {}
    for name, code in (("fla.layers", "import fla.layers"), ("the operators that we use", OURS_ALONE)):
        timing = f"import time, torch\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
        command = [sys.executable, "-W", "ignore", "-c", timing]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return {name: float(process.communicate()[0].splitlines()[-1]) for name, process in running.items()}
