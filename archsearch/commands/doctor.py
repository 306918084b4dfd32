"""Checks of this machine: each says ok, warn or fail, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from archsearch.environment import Gpu, find_gpus, package_version
from archsearch.operators import OPERATORS

if TYPE_CHECKING:
    from torch import Tensor

    from archsearch.model.hybrid import HybridLM

Status = Literal["ok", "warn", "fail"]
GIB = 2**30
TOKENS, HIDDEN = 24, 64
WIDTH = 512
"""At which the training kernels are checked, with each kind's default options."""

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest difference of logits from the plain forward on the CPU, relative to the largest logit."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``remedy`` is empty when all is well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return asdict(self)


def run_checks() -> Iterator[Check]:
    """All checks, the quick ones first; each is independent of the others."""
    gpus = find_gpus()
    yield _guard("python", check_python)
    yield _guard("torch", lambda: check_torch(gpus))
    yield _guard("triton", lambda: check_package("triton", "triton", needed=bool(gpus)))
    yield _guard("flash-linear-attention", lambda: check_package("flash-linear-attention", "fla", needed=bool(gpus)))
    yield _guard("driver", lambda: check_driver(gpus))
    yield _guard("sqlite", check_sqlite)
    yield _guard("ray", check_ray)
    yield _guard("ray token", check_ray_token)
    yield _guard("disk", lambda: check_disk("disk", Path.cwd(), 5 * GIB))
    yield _guard("temporary files", lambda: check_disk("temporary files", Path(tempfile.gettempdir()), 2 * GIB))
    yield _guard("memory", check_memory)
    yield _guard("shared memory", check_shared_memory)
    for kind in OPERATORS:
        yield _guard(f"operator {kind}", partial(check_operator, kind))
    if gpus:
        yield _guard("tuned kernels", check_tuned)
        compile_all()
        for kind in OPERATORS:
            yield _guard(f"kernels {kind}", partial(check_kernels, kind))


def _guard(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks is a finding too."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}".splitlines()[0], "mend what the message names")


def check_python() -> Check:
    """Which Python runs; one that is too old cannot read this file."""
    return Check("python", "ok", sys.version.split()[0])


def check_torch(gpus: list[Gpu]) -> Check:
    """PyTorch imports, and sees the GPU that the driver sees."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        name, build = torch.cuda.get_device_name(0), torch.version.cuda
        return Check("torch", "ok", f"{torch.__version__}, CUDA {build}, {name}")
    if gpus:
        detail = f"{torch.__version__} does not see {gpus[0].name} (driver {gpus[0].driver})"
        return Check("torch", "fail", detail, "install a CUDA build of torch that fits the driver")
    return Check("torch", "ok", f"{torch.__version__}, CPU")


def check_package(name: str, module: str, needed: bool) -> Check:
    """A package that only GPUs need: there and importable."""
    version = package_version(name)
    if version is None:
        if needed:
            return Check(name, "fail", "not installed", "pip install 'archsearch[cuda]'")
        return Check(name, "ok", "not installed, not needed without a GPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        status: Status = "fail" if needed else "warn"
        return Check(name, status, f"{version} does not import: {error}".splitlines()[0], f"reinstall {name}")
    return Check(name, "ok", version)


def check_driver(gpus: list[Gpu]) -> Check:
    """NVML answers."""
    if not gpus:
        return Check("driver", "ok", "no NVIDIA GPU answers; everything runs on the CPU")
    names = ", ".join(f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" for gpu in gpus)
    return Check("driver", "ok", f"{gpus[0].driver}: {names}")


def check_sqlite() -> Check:
    """SQLite commits here, in the journal mode that its build and the file system allow."""
    from archsearch.search.database import journal_mode
    from archsearch.search.filesystem import file_system, is_network

    here = Path.cwd()
    if is_network(here):
        detail = f"{here} lies on a network file system ({file_system(here)})"
        return Check("sqlite", "warn", detail, "keep runs on a local disk with --out")
    mode = journal_mode(here)
    with tempfile.TemporaryDirectory(dir=here, prefix=".archsearch-") as folder:
        connection = sqlite3.connect(Path(folder) / "check.db")
        found = connection.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
        connection.execute("CREATE TABLE t (x)")
        connection.commit()
        connection.close()
    if found.upper() != mode:
        return Check("sqlite", "fail", f"{here} takes no journal mode {mode}", "keep runs on another disk with --out")
    return Check("sqlite", "ok", f"{sqlite3.sqlite_version}, journal mode {mode}")


def check_ray() -> Check:
    """Ray is there; importing it is left to the first run."""
    version = package_version("ray")
    if version is None:
        return Check("ray", "fail", "not installed", "pip install 'ray>=2.54,<2.62', or use --executor inline")
    return Check("ray", "ok", version)


def check_ray_token() -> Check:
    """The token that opens a Ray cluster is for its owner's eyes."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        return Check("ray token", "ok", "none yet; Ray makes one")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Check("ray token", "warn", f"{path} has mode {mode:04o}", f"chmod 600 {path}")
    return Check("ray token", "ok", f"mode {mode:04o}")


def check_disk(name: str, path: Path, wanted: int) -> Check:
    """Free space where runs (or temporary files) go."""
    free = shutil.disk_usage(path).free
    detail = f"{free / GIB:.1f} GiB free in {path}"
    if free < wanted:
        return Check(name, "warn", detail, f"free {wanted / GIB:.0f} GiB")
    return Check(name, "ok", detail)


def check_memory() -> Check:
    """Main memory that is free now."""
    free = psutil.virtual_memory().available
    if free < 2 * GIB:
        return Check("memory", "warn", f"{free / GIB:.1f} GiB available", "close other programs or use fewer workers")
    return Check("memory", "ok", f"{free / GIB:.1f} GiB available")


def check_shared_memory() -> Check:
    """Ray's object store lives in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", "ok", "no /dev/shm on this system")
    free = shutil.disk_usage(path).free
    if free < GIB // 4:
        detail = f"{free / 2**20:.0f} MiB free in {path}"
        return Check("shared memory", "warn", detail, "give the container more, for example --shm-size=2g")
    return Check("shared memory", "ok", f"{free / GIB:.1f} GiB free in {path}")


def check_operator(kind: str) -> Check:
    """Forward, backward and decode steps of one kind on this device, against the plain forward on the CPU."""
    import torch

    from archsearch.architecture import make_architecture
    from archsearch.model.hybrid import build_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    operators = [{"kind": kind, **_small(kind)}, {"kind": "f", "ratio": 2}]
    model = build_model(make_architecture(hidden_size=HIDDEN, vocab_size=64, operators=operators))
    tokens = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    reference = model(tokens).detach().to(device)
    model, tokens = model.to(device), tokens.to(device)
    logits = model(tokens)
    logits.logsumexp(-1).mean().backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
        return Check(f"operator {kind}", "fail", f"a gradient is not finite on {device}", "check torch and the driver")
    scale = reference.abs().max()
    forward = float((logits.detach() - reference).abs().max() / scale)
    steps = float(_step_error(model, tokens, reference) / scale)
    detail = f"{device}, {model.paths()[kind]}: off by {forward:.0e} forward, {steps:.0e} in steps"
    if not max(forward, steps) < TOLERANCE[device]:
        return Check(f"operator {kind}", "fail", detail, "check the versions of torch, triton and fla")
    return Check(f"operator {kind}", "ok", detail)


def check_tuned() -> Check:
    """Kernel configurations are known for this GPU, so that nothing is tuned while a candidate waits."""
    from archsearch.model.tuned import known_files

    files = known_files()
    if not files:
        return Check("tuned kernels", "warn", "none for this GPU: first steps take minutes", "archsearch doctor --tune")
    return Check("tuned kernels", "ok", ", ".join(str(path) for path in files))


def compile_all() -> None:
    """Compile the kernels of all kinds side by side; their checks then find them."""
    from archsearch.model.training_path import compile_ahead

    with contextlib.suppress(Exception):  # whatever is wrong shows in the checks themselves
        compile_ahead([(config(), WIDTH) for config in OPERATORS.values()])


def check_kernels(kind: str) -> Check:
    """The path that this GPU trains a kind with, in bf16, against the reference: output and every gradient."""
    import torch

    from archsearch.errors import ArchsearchError, EnvironmentUnfit
    from archsearch.model import fla_library, self_check
    from archsearch.model.layers import LAYERS

    name, device, config = f"kernels {kind}", torch.device("cuda"), OPERATORS[kind]()
    start = time.perf_counter()
    try:
        LAYERS[kind](config, WIDTH).require()
    except EnvironmentUnfit as error:
        return Check(name, "warn", error.cause, error.remedy)
    try:
        fla_library.require(device)
        found = self_check.require_sound(config, WIDTH, device)
    except ArchsearchError as error:
        return Check(name, "fail", error.cause, error.remedy)
    layer = LAYERS[kind](config, WIDTH)
    layer.path = "fla"
    errors = ", ".join(f"{part} {error:.0e}" for part, error in found.errors.items())
    detail = f"{layer.implementation}, {time.perf_counter() - start:.1f} s, off by: {errors}"
    if fla_library.miscompiles(device):
        detail += "; this Triton miscompiles gated operators on Hopper GPUs, but this check passed"
    return Check(name, "ok", detail)


def _step_error(model: HybridLM, tokens: Tensor, reference: Tensor) -> Tensor:
    """Largest difference of the logits of a prefill and steps from those of the whole sequence."""
    state = model.allocate_state(len(tokens), TOKENS)
    half = TOKENS // 2
    found = [model.prefill(tokens[:, :half], state)]
    found += [model.step(tokens[:, index], state) for index in range(half, TOKENS)]
    return max((x - reference[:, half - 1 + index]).abs().max() for index, x in enumerate(found))


def _small(kind: str) -> dict[str, int]:
    """Options that fit the small width of the check."""
    fields = OPERATORS[kind].model_fields
    return {name: value for name, value in {"head_dim": 16, "state": 16, "window": 8}.items() if name in fields}
