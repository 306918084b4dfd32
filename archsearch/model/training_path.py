"""Puts a model on the path that it trains with, and trusts no kernel before it has been checked here.

Kernels of several operators are compiled side by side, each in a process of its own, into Triton's cache on
disk; workers of one machine share that cache, and wait for each other instead of compiling twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from archsearch.errors import InvalidArchitecture
from archsearch.model import fla_library, requirements, self_check
from archsearch.model.hybrid import HybridLM
from archsearch.operators import OperatorConfig

CAVEAT = ", checked: this Triton is known to miscompile gated operators on Hopper GPUs"

Operator = tuple[OperatorConfig, int]
"""An operator and its width: what kernels are compiled and checked for."""


def prepare(model: HybridLM, path: str, device: torch.device, dtype: torch.dtype) -> HybridLM:
    """``model`` with every operator on ``path`` (``torch``, ``fla`` or ``auto``: fla on a GPU, torch elsewhere).

    Args:
        model: what is to be trained.
        path: an implementation, or ``auto``.
        device: where it will train.
        dtype: of its matrix products.

    Raises:
        ConfigError: the kernels do not compute in ``dtype``.
        EnvironmentUnfit: the device or a library cannot run the kernels; there is no falling back.
        InvalidArchitecture: an operator's options are beyond its kernels.
        WrongKernels: a kernel fails its check on this device.
    """
    if path == "auto":
        path = "fla" if device.type == "cuda" else "torch"
    if path == "fla":
        fla_library.require(device)
        requirements.require_half(str(dtype).removeprefix("torch."))
        for layer in model.layers:
            layer.op.require()
            refuse_unsupported(layer.op.unsupported(), layer.kind)
        hidden = model.architecture.hidden_size
        operators = [(config, hidden) for config in dict.fromkeys(model.architecture.operators)]
        compile_ahead(operators)
        for config, width in operators:
            self_check.require_sound(config, width, device)
            _mark((config, width)).touch()  # also where it was alone, and therefore left to this process
        if fla_library.miscompiles(device):
            for layer in model.layers:
                layer.op.caveat = CAVEAT
    return model.use(path)


def refuse_unsupported(problem: tuple[str, str] | None, kind: str) -> None:
    """Raise InvalidArchitecture for what ``Layer.unsupported`` says."""
    if problem is not None:
        cause, remedy = problem
        raise InvalidArchitecture(f"operator {kind}: {cause}", f"{remedy}, or set proxy.kernels=torch")


def compile_ahead(operators: list[Operator]) -> None:
    """Check what was never checked on this machine, in as many processes as there are cores.

    Alone an operator is left to the caller. What a check finds is not looked at here: the caller's own,
    which then compiles nothing, decides.
    """
    if not _cold(operators):  # nothing to wait for, whoever compiles at the moment
        return
    with _turn():
        cold = _cold(operators)
        if len(cold) < 2:
            return
        cores = len(os.sched_getaffinity(0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        for start in range(0, len(cold), cores):
            batch = cold[start : start + cores]
            quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running = [subprocess.Popen(_command(one), **quiet) for one in batch]
            for operator, process in zip(batch, running, strict=True):
                if process.wait() == 0:
                    _mark(operator).touch()


def _cold(operators: list[Operator]) -> list[Operator]:
    return [operator for operator in operators if not _mark(operator).exists()]


def _command(operator: Operator) -> list[str]:
    config, hidden = operator
    options = json.dumps(config.model_dump(mode="json"))
    return [sys.executable, "-m", "archsearch.model.self_check", config.kind, options, str(hidden)]


@contextmanager
def _turn() -> Iterator[None]:
    """Only one worker of a machine compiles ahead at a time; the others then find it done."""
    with (_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _folder() -> Path:
    from triton import knobs

    folder = Path(knobs.cache.dir) / "archsearch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mark(operator: Operator) -> Path:
    """The empty file that says: compiled here, with these versions."""
    config, hidden = operator
    versions = [importlib.metadata.version(name) for name in ("torch", "triton", "fla-core")]
    identity = [config.kind, config.model_dump(mode="json"), hidden, torch.cuda.get_device_name(), versions]
    return _folder() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
