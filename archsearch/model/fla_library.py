"""flash-linear-attention, imported piece by piece, and what it needs of this machine.

Its packages import everything they have: layers, models and with them transformers, 11 to 16 s on a
worker's way to its first step. Here their ``__init__`` runs only when somebody asks them for a name,
so that ``import fla.layers`` still works beside us. And its modules mark functions that torch.compile must
leave alone, for which torch imports its compiler, most of the time that is left: here it waits until it is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from archsearch.model import requirements
from archsearch.model.requirements import installed

DEFERRED = ("fla", "fla.ops", "fla.modules", "fla.modules.norm", "mamba_ssm")
"""Packages whose ``__init__`` imports far more than the operator that is wanted, or (mamba-ssm) fails without
the CUDA extension that the Triton scan does not need.
"""

MIN_TRITON = (3, 7, 1)
"""Triton from 3.4 up to this miscompiles the gated backward pass on Hopper: wrong gradients, no error."""

HOPPER = (9, 0)


def load(name: str) -> ModuleType:
    """The module ``name`` of fla, for example ``fla.ops.gla.chunk``, with tuned configurations in place.

    Raises:
        EnvironmentUnfit: it is not installed.
    """
    library = name.partition(".")[0]
    if not installed(library):
        raise requirements.missing(library)
    for package in DEFERRED:
        if package.startswith(library) and package not in sys.modules:
            _defer(package)
    # also where somebody else has imported the module before: its tuners know nothing of our configurations then
    from archsearch.model import tuned

    with _compiler_postponed():
        module = importlib.import_module(name)
    tuned.install()
    guarded = sys.modules.get("fla.ops.common.chunk_o")
    if guarded is not None and torch.cuda.is_available() and miscompiles(torch.device("cuda")):
        # fla refuses these gradients unseen; here they are compared with the reference first (self_check)
        guarded.TRITON_ABOVE_3_7_1 = True
    return module


@functools.cache
def operator(path: str) -> Any:
    """The function that ``path`` names, for example ``fla.ops.gla.chunk:chunk_gla``."""
    module, _, name = path.partition(":")
    return getattr(load(module), name)


def _defer(name: str) -> None:
    """Register the package ``name`` without running its ``__init__``, until a name of it is missed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise requirements.missing(name)
    module = importlib.util.module_from_spec(spec)

    def run(attribute: str) -> Any:
        if attribute.startswith("__") or "__getattr__" not in vars(module):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        del module.__getattr__
        spec.loader.exec_module(module)
        return getattr(module, attribute)

    module.__getattr__ = run
    if name == "fla":
        module.__version__ = importlib.metadata.version("fla-core")
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


@contextmanager
def _compiler_postponed() -> Iterator[None]:
    """Let ``torch.compiler.disable`` mark functions without importing torch's compiler (``_left_alone``)."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    disable = torch.compiler.disable
    torch.compiler.disable = _left_alone
    try:
        yield
    finally:
        torch.compiler.disable = disable


def _left_alone(function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
    """``torch.compiler.disable``, done at the first call that finds the compiler imported; before, none can be
    compiling. Calls are quicker as well: a marked function switches the compiler off and on again at each.
    """
    if function is None:
        return functools.partial(_left_alone, recursive=recursive, **options)
    marked: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not marked:
            marked.append(torch.compiler.disable(function, recursive, **options))
        return marked[0](*args, **kwargs)

    return call


def require(device: torch.device) -> None:
    """Raise EnvironmentUnfit where the kernels cannot run on ``device`` at all, with what would help."""
    if device.type != "cuda":
        requirements.require_gpu(str(device))
    requirements.require_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    requirements.require_libraries()


def miscompiles(device: torch.device) -> bool:
    """Whether this Triton is known to give wrong gradients of gated operators on ``device``."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return torch.cuda.get_device_capability(device) == HOPPER and (3, 4, 0) <= version < MIN_TRITON
