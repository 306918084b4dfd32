"""What training through the GPU kernels needs. No torch is loaded: the driver of a search asks before it starts."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import TYPE_CHECKING

from archsearch.environment import Gpu, find_gpus, package_version
from archsearch.errors import ConfigError, EnvironmentUnfit

if TYPE_CHECKING:
    from archsearch.config import RunConfig

MIN_CAPABILITY = (8, 0)
"""Ampere: the first GPUs with bf16 matrix units."""

LIBRARIES = {"triton": "triton", "fla": "flash-linear-attention"}
"""Modules that every kind of operator needs, and what they are installed as."""

SLOW = "set proxy.kernels=torch for the slow reference"


def prepare_kernels(config: RunConfig) -> None:
    """Refuse a run whose every training would be refused on this machine, before the first candidate asks.

    On a cluster, and where NVML does not answer, the workers find out.

    Raises:
        ConfigError: the kernels do not compute in ``proxy.dtype``.
        EnvironmentUnfit: the device or a library cannot run them, or not those of an operator of the space.
    """
    training = {"loss", "recall"} & set(config.search.objectives) or config.space.limits.recall is not None
    if not training or config.execution.address is not None or config.proxy.kernels == "torch":
        return
    gpus = _gpus(config.execution.device)
    if not gpus:
        if config.proxy.kernels == "fla" and config.execution.device != "cuda":
            require_gpu("a CPU")
        return
    newest = max(gpus, key=lambda gpu: gpu.capability)
    require_capability(newest.name, newest.capability)
    if config.proxy.dtype != "auto":
        require_half(config.proxy.dtype)
    require_libraries()
    if "m" in set().union(*(stage.kinds() for stage in config.space.stages)):
        require_mamba()


def _gpus(device: str) -> list[Gpu]:
    """Those that workers train on."""
    cpu = device == "cpu" or "+cpu" in (package_version("torch") or "")
    return [] if cpu else find_gpus()


@functools.cache
def installed(library: str) -> bool:
    """Whether the top-level package ``library`` can be found; nothing of it runs."""
    return library in sys.modules or importlib.util.find_spec(library) is not None


def missing(name: str) -> EnvironmentUnfit:
    """What to raise where the library ``name`` is not installed."""
    return EnvironmentUnfit(f"training on a GPU needs {name}", f"pip install 'archsearch[cuda]', or {SLOW}")


def require_gpu(device: str) -> None:
    """Raise EnvironmentUnfit: ``device`` is none that the kernels run on."""
    raise EnvironmentUnfit(f"the GPU kernels do not run on {device}", "set proxy.kernels=auto")


def require_capability(name: str, capability: tuple[int, int]) -> None:
    """Raise EnvironmentUnfit where the GPU ``name`` is too old."""
    if capability < MIN_CAPABILITY:
        raise EnvironmentUnfit(
            f"{name} is older than Ampere: no bf16 matrix units",
            f"use a GPU of compute capability 8.0 or higher, or {SLOW}",
        )


def require_half(dtype: str) -> None:
    """Raise ConfigError where the kernels do not compute in ``dtype``."""
    if dtype not in ("bfloat16", "float16"):
        raise ConfigError(
            f"proxy.dtype: the GPU kernels compute in bfloat16, not {dtype}", f"set proxy.dtype=bfloat16, or {SLOW}"
        )


def require_libraries() -> None:
    """Raise EnvironmentUnfit with the first library that every kind needs and that is missing."""
    for module, name in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            raise missing(name)


def require_mamba() -> None:
    """Raise EnvironmentUnfit where mamba-ssm's CUDA extension is not built."""
    absent = [name for name in ("mamba_ssm", "selective_scan_cuda") if not installed(name)]
    if absent:
        raise EnvironmentUnfit(
            f"operator m (Mamba) trains on a GPU through mamba-ssm's CUDA extension, and {' and '.join(absent)} "
            "cannot be imported",
            f"build it (pip install 'archsearch[mamba]' where nvcc is), choose m2 (Mamba-2) instead, or {SLOW}",
        )
