"""What a run ran on: packages, machine, GPUs and the state of the code. No secrets: variables by name only."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import psutil

from archsearch.schema import Frozen

PACKAGES = (
    "archsearch",
    "torch",
    "triton",
    "flash-linear-attention",
    "mamba-ssm",
    "optuna",
    "ray",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "safetensors",
    "numpy",
    "pandas",
    "pydantic",
    "nvidia-ml-py",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
)
"""The only environment variables that are recorded: they change results and hold no secret."""
NVML_SECONDS = 5.0
T = TypeVar("T")


class Gpu(Frozen):
    """One device as NVML names it; memory in bytes, compute capability as (major, minor)."""

    name: str
    uuid: str
    memory: int
    driver: str
    capability: tuple[int, int]


class Git(Frozen):
    """The commit of the code that ran, and whether it had changes on top."""

    commit: str
    dirty: bool


class Environment(Frozen):
    """Everything about the machine that may explain a result later."""

    captured: str
    python: str
    system: str
    cpu: str
    cores: int
    memory: int
    packages: dict[str, str]
    gpus: tuple[Gpu, ...] = ()
    git: Git | None = None
    sqlite: str
    variables: dict[str, str]


def capture_environment() -> Environment:
    """Look at this machine. Takes a second at most beyond a hanging driver's ``NVML_SECONDS``."""
    return Environment(
        captured=datetime.now(UTC).isoformat(timespec="seconds"),
        python=sys.version.split()[0],
        system=platform.platform(),
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        packages={name: version for name in PACKAGES if (version := package_version(name))},
        gpus=tuple(find_gpus()),
        git=git_state(Path(__file__).resolve().parent),
        sqlite=sqlite3.sqlite_version,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def git_state(folder: Path) -> Git | None:
    """The commit of ``folder``; None outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return Git(commit=commit, dirty=bool(_git(folder, "status", "--porcelain", "--untracked-files=no")))


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine; none without a driver, or where the driver does not answer."""
    try:
        return within(NVML_SECONDS, _read_gpus)
    except Exception:  # NVML raises errors of its own for every way in which a driver can be absent
        return []


def within(seconds: float, function: Callable[[], T]) -> T:
    """``function()`` in a thread, because a sick driver hangs for ever. Raises TimeoutError, or what it raised."""
    values: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not values:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return values[0]


def _read_gpus() -> list[Gpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                driver=driver,
                capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()
