"""The device that measures: what it is, how much memory is free, and what its failures mean."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
import torch

from archsearch.environment import cpu_name, package_version
from archsearch.errors import EnvironmentUnfit, UsageError
from archsearch.latency.lock import device_key
from archsearch.latency.nvml import ask_nvml
from archsearch.schema import Frozen

_CGROUP = Path("/sys/fs/cgroup")
_FAILURE = re.compile(r"CUDA error|CUDA driver|cudaError|device-side assert|No CUDA GPUs", re.IGNORECASE)


class DoesNotFit(EnvironmentUnfit):
    """The model and its state are larger than the free memory of the device."""


class DeviceInfo(Frozen):
    """What a measurement ran on.

    Attributes:
        memory: bytes.
        cores: processor cores, or multiprocessors of a GPU.
        l2: bytes of a GPU's last cache; 0 where it is not known.
        uuid_hash: tells GPUs apart without naming them.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    cores: int
    l2: int = 0
    driver: str = ""
    uuid_hash: str = ""
    versions: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: no such device.
        EnvironmentUnfit: a GPU is asked for and none can be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"unknown device {name!r}", "give auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise EnvironmentUnfit("no CUDA device can be used", "use the device cpu, or see `archsearch doctor`")
    index = int(match[1]) if match[1] else torch.cuda.current_device()
    if index >= count:
        raise EnvironmentUnfit(f"there is no {name}: {count} CUDA devices are visible", "give a lower number")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The maker's name of a CPU or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def describe(device: torch.device) -> DeviceInfo:
    """Name, memory, driver and library versions of ``device``."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    versions["triton"] = package_version("triton") or ""
    if device.type == "cpu":
        memory = psutil.virtual_memory().total
        return DeviceInfo(name=device_name(device), kind="cpu", memory=memory, cores=_cores(), versions=versions)
    properties = torch.cuda.get_device_properties(device)
    driver, note = ask_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))
    return DeviceInfo(
        name=device_name(device),
        kind="cuda",
        memory=properties.total_memory,
        cores=properties.multi_processor_count,
        l2=getattr(properties, "L2_cache_size", 0),
        driver=driver or "",
        uuid_hash=hashlib.sha256(device_key(device).encode()).hexdigest()[:12],
        versions=versions,
        notes=(note,) if note else (),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Memory


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, within the container's limit if there is one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, _cgroup_memory())


def _cgroup_memory() -> int:
    """Bytes left under the container's limit (cgroup v2); no limit reads as a very large number."""
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return sys.maxsize
    return limit - used + (int(cached[1]) if cached else 0)


def require_memory(device: torch.device, needed: int, what: str) -> None:
    """Raise DoesNotFit before anything is allocated when ``needed`` bytes are not free."""
    free = free_memory(device)
    if needed > free:
        cause = f"{what} needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free"
        raise DoesNotFit(cause, "use a smaller model, batch or number of tokens, or a larger device")


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what CUDA says of a full, lost or broken GPU into errors with a remedy.

    Raises:
        DoesNotFit: memory ran out after all.
        EnvironmentUnfit: the GPU vanished, or its context is broken.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        cause = f"{device} ran out of memory: {str(error).splitlines()[0]}"
        raise DoesNotFit(cause, "use a smaller model, batch or number of tokens, or a larger device") from error
    except RuntimeError as error:
        if device.type != "cuda" or not _FAILURE.search(str(error)):
            raise
        cause = f"{device} failed: {str(error).splitlines()[0]}"
        raise EnvironmentUnfit(cause, "see nvidia-smi and the kernel's log, then start a new process") from error
